"""What tasks for methods that change weights have in common: examples that small models are taught."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vestige.core.spec import param
from vestige.errors import SpecError
from vestige.evidence.tasks.task import Task

if TYPE_CHECKING:
    from vestige.evidence.runs.spec import Data

__all__ = ["WeightsTask"]


class WeightsTask(Task):
    """A task for learners or erasers. A seed says which rows are learnt, which are asked, and in which order."""

    data: Literal["digits", "elements", "countries", "npz", "jsonl"] = param(
        "digits", "images: digits, npz; questions: elements, countries, jsonl"
    )
    file: str | None = param(None, "of npz and jsonl: arrays, or a question with its answer per line")
    limit: int | None = param(None, "rows of images, or subjects of questions, that are used; all if None", ge=4)

    def check(self) -> None:
        self.source(0)
        if self.file is not None and not Path(self.file).is_file():
            raise SpecError(f"{self.name}: parameter 'file' is {self.file!r}; there is no such file")

    def stamp(self) -> dict[str, Any]:
        if self.file is None:
            return super().stamp()
        return {**super().stamp(), "text": hashlib.sha256(Path(self.file).read_bytes()).hexdigest()[:16]}

    def source(self, seed: int) -> Data:
        """Where the examples of a seed come from.

        Raises:
            SpecError: a file where none is read, or none where one is.
        """
        import pydantic

        from vestige.evidence.runs.spec import Data

        try:
            file = None if self.file is None else Path(self.file)
            return Data.model_validate({"name": self.data, "file": file, "limit": self.limit, "seed": seed})
        except pydantic.ValidationError as error:
            raise SpecError(f"{self.name}: parameter 'file': {error.errors()[0]['msg']}") from None
