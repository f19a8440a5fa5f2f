"""A step that is the same every time, captured once as a CUDA graph: the GPU then runs it without the host's help."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

EAGER_CALLS = 4  # they load and tune kernels, which a capture must not


class Replay:
    """Calls a function of no arguments; on CUDA it replays a captured graph of it from the fifth call on.

    The function works on tensors that stay where they are, and never asks the device for a value. Every call has its
    effects once: the first ones run as they are, and capturing runs nothing.

    Args:
        function: what to run.
        device: of its tensors.
        capture: False runs it as it is on every device.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, capture: bool = True) -> None:
        self.function, self.device = function, device
        self.capture = capture and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        """Runs the function once."""
        if not self.capture:
            self.function()
            return
        with torch.cuda.device(self.device):
            if self._graph is not None:
                self._graph.replay()
            elif self._calls < EAGER_CALLS:
                self._run_aside()
            else:
                torch.cuda.empty_cache()  # what the eager calls held: the graph has a pool of its own
                self._graph = torch.cuda.CUDAGraph()
                # NCCL, where there are several processes, has a thread of its own that asks for events meanwhile
                mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
                with torch.cuda.graph(self._graph, capture_error_mode=mode):
                    self.function()
                self._graph.replay()
        self._calls += 1

    def release(self) -> None:
        """Lets the graph go, and the process groups that it exchanges through; later calls begin as the first ones."""
        if self._graph is not None:
            self._graph.reset()
            self._graph, self._calls = None, 0

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph by now."""
        return self._graph is not None

    def _run_aside(self) -> None:
        """On a stream of its own, as a capture will run it."""
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self.function()
        current.wait_stream(aside)
