"""How far a ring grows for backward passes that are outstanding: its user calls `backward` whenever that suits.

The slots double until the oldest outstanding pass still finds what it retrieved. That is told once, and ends at 8 times
the first size, unless the user wants as much as it takes: whoever keeps a loss by mistake would fill the device.
"""

from __future__ import annotations

import warnings

from memtrans_kernels import StaleMemoryError

LIMIT = 8  # times the first size


class Growth:
    """What a ring asks before it grows.

    Args:
        capacity: M.
        spare: S that the ring begins with.
        unbounded: whether it may become larger than `LIMIT` times its first size.
    """

    def __init__(self, capacity: int, spare: int, unbounded: bool) -> None:
        self.capacity, self.unbounded, self.told = capacity, unbounded, False
        self.begin_with(spare)

    def begin_with(self, spare: int) -> None:
        """Makes the size of a ring with so many spare slots the first one, if that is larger."""
        self.first = max(getattr(self, "first", 0), self.capacity + spare)

    def room(self, spare: int, needed: int, bytes_of_slot: int) -> int:
        """How many spare slots a ring of `spare` gets when outstanding backward passes need `needed`.

        bytes_of_slot: of keys and values, in all rows.

        Warns the first time. Raises StaleMemoryError where the ring would become too large.

        >>> with warnings.catch_warnings(action="ignore"):
        ...     Growth(capacity=6, spare=4, unbounded=False).room(4, 9, bytes_of_slot=1 << 20)
        14
        """
        slots = self.capacity + spare
        while slots < self.capacity + needed:
            slots *= 2
        if slots > LIMIT * self.first and not self.unbounded:
            raise StaleMemoryError(
                f"spare must be {needed} or more, or 'grow', for what was added since the oldest forward pass whose "
                f"backward is outstanding, got {spare}: the memory would grow to {slots * bytes_of_slot:,} bytes, more "
                f"than {LIMIT} times its first size; call backward earlier, or let go of losses that have none"
            )
        if not self.told:
            self.told = True
            before = (self.capacity + spare) * bytes_of_slot
            warnings.warn(
                f"a memory of {before:,} bytes grows to {slots * bytes_of_slot:,}, because entries are added before a "
                f"backward pass that must still read older ones; spare={needed} or more avoids it, as many as are "
                f"added between a forward pass and its backward",
                stacklevel=2,
            )
        return slots - self.capacity
