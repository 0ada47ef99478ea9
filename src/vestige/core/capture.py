"""CUDA graphs: the kernels of a step, launched at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured"]


def captured(
    run: Callable[[], Any], device: torch.device, *, warm_up: Callable[[], Any] | None = None, times: int = 2
) -> torch.cuda.CUDAGraph:
    """A graph of what a function does on a CUDA device.

    Args:
        run: reads and writes the same memory each time.
        device: where.
        warm_up: what runs before, while kernels are compiled and chosen; default: the function itself.
        times: how often.
    """
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(times):
            (warm_up or run)()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are captured: one for all, since each stream that multiplies has its own workspace."""
    return torch.cuda.Stream(device)
