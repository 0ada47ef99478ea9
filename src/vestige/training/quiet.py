"""What transformers says that says nothing here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_bars", "without_talk_of_times"]


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers inside the block, for files that are read or written in a moment."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


@contextmanager
def without_talk_of_times() -> Iterator[None]:
    """Inside the block transformers does not warn of checkpoints whose times do not tell which is the newest, as it
    does of any that are written within a second; what else it warns of is heard."""

    def heard(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("mtime may not be reliable")

    source = logging.getLogger("transformers.trainer_utils")
    source.addFilter(heard)
    try:
        yield
    finally:
        source.removeFilter(heard)
