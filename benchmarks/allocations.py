"""What a function allocates on the CPU, as PyTorch's profiler saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Bytes: of the largest tensor, and of all that were held together, beyond what was there before."""

    largest: int
    peak: int


def allocations(function: Callable[[], object]) -> Allocations:
    """Of one call. What else allocates meanwhile counts too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    sizes = [size for _, size in sorted(_changes(found.profiler.kineto_results.experimental_event_tree()))]
    return Allocations(max(sizes, default=0), max(accumulate(sizes), default=0))


def _changes(events: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """When memory was taken or given back, and how much: of these events and those inside them."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _changes(event.children)
