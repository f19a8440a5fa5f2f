"""The ring that holds one layer's memory: the one owner of keys, values, cursors and host counts.

Entry i of a row lives in slot i mod (M + S). Visible to a search are the entries [max(start, cursor - M), cursor); the
S spare slots keep what a forward pass retrieved readable for its backward, until S more entries were added. Clearing
moves `start`; nothing is rewritten. Where a backward pass that is outstanding would lose what it must read, the ring is
laid out anew (`growth.py`); the old storage stays as it is, with host counts of its own. Nothing here asks the device
for a value, so nothing here waits for it.

    keys           (R, M + S, D)  written by `knn_add_` alone
    values         (R, M + S, E)  likewise
    cursor, start  (R,) int64     on the device
    clearings                     how often each row was cleared (`clearings.py`)
    written        (R,) int64     on the host: entries ever given to each row
    ids                           of the entries, where they are kept (`ids.py`)

`keys_read`, `values_read` and `written_read` are the same memory behind a tensor of its own (through DLPack), with a
version counter of its own. Readers hold these. Autograd would otherwise refuse a backward pass after an add, and
torch.compile would copy the whole memory to keep the old contents for it; the spare slots and the host counts are what
makes reading them safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from memtrans.memory.clearings import Clearings
from memtrans.memory.growth import Growth
from memtrans.memory.ids import KeptIds
from memtrans.memory.layout import laid_out, visible, without
from memtrans.memory.observation import Watch
from memtrans.memory.snapshot import MemorySnapshot
from memtrans_kernels import (
    ledger_ticket,
    read_cursors,
)
from memtrans_kernels.ledger import room_needed


def _alias(tensor: Tensor) -> Tensor:
    with torch.cuda.device_of(tensor):  # PyTorch exports tensors of the current GPU only
        return torch.from_dlpack(tensor.detach())


class Ring:
    """The slots of R memory rows on one device; see the module's docstring for its fields.

    Args:
        rows: R.
        capacity: M.
        spare: S.
        dim: D.
        value_dim: E. Default: D.
        key_dtype: of the keys.
        value_dtype: of the values.
        device: of both.
        backend: passed to search, and to add where that backend implements it.
        unbounded: whether it grows as far as outstanding backward passes need it.
        keep_ids: whether it keeps ids.
        watch: who watches what is retrieved. Default: nobody.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        spare: int,
        dim: int,
        *,
        value_dim: int | None = None,
        key_dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device,
        backend: str,
        unbounded: bool = False,
        keep_ids: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.capacity, self.watch = capacity, watch or Watch()
        self.backend = backend
        self.growth = Growth(capacity, spare, unbounded)
        self.cursor = torch.zeros(rows, dtype=torch.int64, device=device)
        self.start = torch.zeros(rows, dtype=torch.int64, device=device)
        self.clearings = Clearings(rows, device)
        self._count_on(torch.zeros(rows, dtype=torch.int64, device="cpu"))
        self.carried = 0  # spare slots of the storage before this one, and what was written when it was laid out anew
        self.laid_out = self.written.clone()
        self.ids = KeptIds(rows, capacity + spare, device) if keep_ids else None
        self._hold(
            torch.zeros(rows, capacity + spare, dim, dtype=key_dtype, device=device),
            torch.zeros(rows, capacity + spare, value_dim or dim, dtype=value_dtype, device=device),
        )

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.keys_read, self.values_read = _alias(keys), _alias(values)
        self.spare = keys.shape[1] - self.capacity

    def _count_on(self, written: Tensor) -> None:
        self.written, self.written_read = written, _alias(written)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and ids."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.ids is None else self.ids.slots.nbytes)

    def window(self, newest: int) -> tuple[Tensor, Tensor]:
        """Which the newest so many entries of each row are, old to new (R, newest), and their slots (R, newest)."""
        entry = self.cursor[:, None] - newest + torch.arange(newest, device=self.cursor.device)
        return entry, entry % self.keys.shape[1]

    def widen(self, spare: int) -> None:
        """Lays the ring out again for longer segments; snapshots and pending backwards keep reading the old one."""
        self._lay_out(spare)
        self.growth.begin_with(spare)

    @torch.inference_mode(False)  # what an evaluation lets grow can be trained with later
    def make_room(self, ticket: Tensor, length: int) -> None:
        """Grows if `length` more entries for the rows of `ticket` would overwrite what a backward pass must read.

        Raises StaleMemoryError where it would become too large.
        """
        needed = room_needed(self.written, ticket, length)
        captured = self.keys.is_cuda and torch.cuda.is_current_stream_capturing()
        if needed > self.spare and not captured:
            self._lay_out(self.growth.room(self.spare, needed, self.nbytes // self.keys.shape[1]))

    def _lay_out(self, spare: int) -> None:
        entry, _ = self.window(self.keys.shape[1])
        self.carried = self.spare
        self._move(partial(laid_out, source=entry, target=entry, slots=self.capacity + spare), self.written.clone())

    @torch.inference_mode(False)  # see `make_room`
    def remove(self, rows: Tensor, host_rows: Sequence[int], gone: Tensor) -> None:
        """Removes entries; those that stay become each row's newest, in their order, in a new storage.

        Snapshots and pending backward passes keep reading the old one. Nothing can be added behind those snapshots.

        rows, host_rows: (B·G,). gone: (B·G, M) bool, over `visible`.
        """
        everywhere = torch.zeros(len(self.start), gone.shape[1], dtype=torch.bool, device=gone.device)
        moved, start = self._removal(everywhere.index_copy(0, rows, gone))
        written = self.written.clone()
        written[list(host_rows)] += 1  # so that every snapshot of before is older than this storage
        self.carried = 0
        self._move(moved, written)
        self.start.copy_(start)

    def _removal(self, gone: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """What makes keys, values or ids those of a ring without some entries (R, M), and where its rows begin (R,)."""
        source, target, count = without(self.start, self.cursor, gone)
        return partial(laid_out, source=source, target=target, slots=self.keys.shape[1]), self.cursor - count

    def _move(self, moved: Callable[[Tensor], Tensor], written: Tensor) -> None:
        """Goes on in a new storage, which `moved` makes of keys, values and ids. written: (R,), its counts."""
        if self.ids is not None:
            self.ids.slots = moved(self.ids.slots)
        self._hold(moved(self.keys), moved(self.values))
        self.laid_out = written.clone()
        self._count_on(written)

    def visible(self) -> tuple[Tensor, Tensor]:
        """The numbers of the entries that a search may find, and which there are: (R, M) each; see `layout.visible`."""
        return visible(self.start, self.cursor, self.capacity)

    def look_up(self, ring: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
        """Entries (B·G, E) of keys, values or ids (R, M + S, ...), by number: (B·G, E, ...)."""
        return ring[rows[:, None], entries % ring.shape[1]]

    def snapshot(self, rows: Tensor, host_rows: Sequence[int], documents: int) -> MemorySnapshot:
        """The memory as it stands. rows, host_rows: (B·G,) in scope, of so many documents."""
        ticket = ledger_ticket(self.written, host_rows)
        start, cursor = read_cursors(self.start, self.cursor)
        return MemorySnapshot(
            self, rows, documents, start, cursor, self.keys_read, self.values_read, ticket, self.written_read,
            self.clearings.as_they_stand(), *self.ids_seen(), in_order=list(host_rows) == list(range(len(self.start))),
        )  # fmt: skip

    def ids_seen(self) -> tuple[Tensor | None, Tensor | None]:
        """What a snapshot holds of the ids: their slots, and where the documents began; None where none are kept."""
        if self.ids is None:
            return None, None
        return self.ids.slots, read_cursors(self.ids.origin, self.ids.origin)[0]

    def lengths(self) -> Tensor:
        """How many entries each row holds (R,)."""
        return (self.cursor - self.start).clamp(max=self.capacity)

    def state(self) -> dict[str, Tensor]:
        """Copies of what it holds; see `state.py`."""
        lengths = self.lengths()
        return {**self.newest(int(lengths.max())), "lengths": lengths, **self.counts(self.cursor)}

    def counts(self, cursor: Tensor) -> dict[str, Tensor]:
        """How many entries each row's document was given (R,), where ids are kept, and how often each row was cleared
        (R,), where one was. cursor: (R,), of the whole row."""
        positions = {} if self.ids is None else {"positions": cursor - self.ids.origin}
        return {**positions, "clearings": self.clearings.count.clone()} if self.clearings.any else positions

    def newest(self, count: int) -> dict[str, Tensor]:
        """Copies of the newest so many keys (R, count, D), values (R, count, E) and ids (R, count), old to new."""
        _, slot = self.window(count)
        row = torch.arange(slot.shape[0], device=slot.device)[:, None]
        ids = {} if self.ids is None else {"ids": self.ids.slots[row, slot]}
        return {"keys": self.keys[row, slot], "values": self.values[row, slot], **ids}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the newest entries of a state that it has room for; nothing was added before."""
        device, count = self.cursor.device, len(self.cursor)
        kept = min(state["keys"].shape[1], self.capacity)
        newest = {name: tensor[:, -kept:].to(device) for name, tensor in state.items() if tensor.dim() > 1 and kept}
        if newest:
            snapshot = self.snapshot(torch.arange(count, device=device), range(count), documents=count)
            snapshot.append(newest["keys"][:, None], newest["values"][:, None], ids=newest.get("ids"))
        self.start.copy_(kept - state["lengths"].clamp(max=kept))
        self.load_clearings(state)
        if self.ids is not None:
            self.ids.origin.copy_(kept - state["positions"].to(device))

    def load_clearings(self, state: Mapping[str, Tensor]) -> None:
        """Takes up how often each row was cleared, where the state says that one was."""
        cleared = state.get("clearings")
        self.clearings.take_up(None if cleared is None else cleared.to(self.cursor.device))
