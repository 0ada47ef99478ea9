"""CUDA graphs: the kernels of a step, launched at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured", "waits"]


def captured(
    run: Callable[[], Any], device: torch.device, *, warm_up: Callable[[], Any] | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of what a function does on a CUDA device.

    Args:
        run: reads and writes the same memory each time.
        device: where.
        warm_up: what runs before, while kernels are compiled and chosen; default: the function itself.
    """
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # the second time finds all settled
            (warm_up or run)()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph


def waits(run: Callable[[], Any]) -> bool:
    """Whether a function makes Python wait for the device, which a capture does not survive.

    Nothing may be captured after a capture that failed: so this is to be asked before.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are captured: one for all, since each stream that multiplies has its own workspace."""
    return torch.cuda.Stream(device)
