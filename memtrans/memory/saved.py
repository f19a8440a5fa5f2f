"""State and files of a memory: what it holds as tensors, as one safetensors file, and as a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from memtrans.devices import usable_device
from memtrans.memory.announcement import announcement
from memtrans.memory.checks import running_backward
from memtrans.memory.files import check_configuration, of_class_alone
from memtrans.memory.moving import Movable, device_and_dtype
from memtrans.memory.observation import Watch
from memtrans.memory.state import check_state, holds_nothing, memory_arguments, state_parts, with_ids, without_ids
from memtrans.memory.stored import StoredMemory
from memtrans.storage import load_tensors, save_tensors
from memtrans_kernels import checks

NOT_PICKLED = ("_ring", "_rows", "_announcement", "watch")
MemoryType = TypeVar("MemoryType", bound="SavedMemory")


class SavedMemory(StoredMemory, Movable):
    """A memory that can be saved, loaded and moved."""

    def to(self: MemoryType, *args: Any, **kwargs: Any) -> MemoryType:
        """Moves what the memory holds to another device, or stores it in another dtype, in place; returns the memory.

        The arguments are those of `torch.nn.Module.to`: a device, a dtype, both, or a tensor that has them. A dtype is
        for keys and values. On another device a memory whose dtype nobody chose has that device's default. Snapshots
        and pending backward passes keep what they read.

        Raises ValueError or TypeError, and changes nothing, for a device or dtype that no memory can have.

        >>> memory = SavedMemory(dim=2, max_memories=4, device="cpu")
        >>> memory.half().to("cpu").dtype
        torch.float16
        """
        device, dtype = device_and_dtype(*args, **kwargs)
        checks.stored(dtype=dtype)
        device = None if device is None else usable_device(device)
        chosen = (self.dtype, self.value_dtype) if dtype is None else (dtype, dtype)
        if device in (None, self.device) and chosen == (self.dtype, self.value_dtype):
            return self
        state = None if self._ring is None else self.state_dict()
        known = None if self._ring is None else self._ring.clearings
        self.dtype, self.value_dtype = chosen
        device = device or self.device
        self._forget_storage()
        if device is not None:
            self._prepare(device, 0)
        if state is not None and known is not None:
            self.load_state_dict(state)
            assert self._ring is not None
            self._ring.clearings.know_as(known)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what the memory holds: keys (R, longest row, D) and values (R, longest row, E), old to new and
        ending with the newest entry, and lengths (R,); with keep_ids also ids (R, longest row), and positions (R,), how
        many entries each document was given; once a document was cleared also clearings (R,), how often each was. Of a
        sharded memory this rank's share, which `join_shards` puts together."""
        rows = self.num_indices * self.kv_heads
        if self._ring is None:
            keys = torch.zeros(rows, 0, self.dim, dtype=self.dtype)
            values = torch.zeros(rows, 0, self.value_dim, dtype=self.value_dtype or self.dtype)
            nothing = torch.zeros(rows, dtype=torch.int64)
            ids = {"ids": nothing.new_zeros(rows, 0), "positions": nothing.clone()} if self.keep_ids else {}
            cleared = {} if self._cleared is None else {"clearings": self._cleared.clone()}
            return {"keys": keys, "values": values, "lengths": nothing, **ids, **cleared}
        return self._ring.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces what the memory holds; of a larger memory's entries it keeps the newest.

        A sharded memory takes up its own share, or that of a whole memory's state. A memory that has no device yet
        takes that of the entries, if there are any. With keep_ids the entries of a state without ids are numbered from
        the oldest that a document holds; without keep_ids those of a state are left out.

        Raises ValueError or TypeError, and keeps what it held, when the state belongs to another width, batch or number
        of heads, or is a share of another sharding.
        """
        self.check_state(state)
        self._cleared = state.get("clearings", torch.zeros_like(state["lengths"])) if holds_nothing(state) else None
        if self._ring is None and holds_nothing(state):
            return
        device = self.device or state["keys"].device
        self._forget_storage()
        self._prepare(device, 0)
        assert self._ring is not None
        self._ring.load(with_ids(state) if self.keep_ids else without_ids(state))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError or TypeError unless `load_state_dict` can take the state up."""
        shard = None if self._ranks is None else (self._ranks.rank, self._ranks.size)
        check_state(state, self.num_indices * self.kv_heads, (self.dim, self.value_dim), shard)

    def save(self, path: str | Path) -> None:
        """Writes the memory as one safetensors file, atomically: a file that was there before survives a failure.

        Directories that are missing are made.
        """
        save_tensors(path, self.state_dict(), "memtrans.KNNMemory", self.configuration())

    @of_class_alone
    @classmethod
    def load(
        cls: type[MemoryType], path: str | Path, *, device: torch.device | str | None = None, **overrides: Any
    ) -> MemoryType:
        """Reads a memory that `save` wrote; keyword arguments of the constructor override what the file says.

        device: Default: the CPU; of a file without entries, that of the first tensor it sees. Entries are cast to the
        default of that device unless the saved memory had a dtype of its own. Files of earlier versions do not say
        whether it had: theirs stay what they are, and dtype=None, value_dtype=None gives the default.

        Raises ValueError when the file is damaged or not a saved memory, FileNotFoundError when there is none.
        TypeError when called on an instance, whose own entries `load_state_dict` replaces.
        """
        state, configuration = load_tensors(path, "memtrans.KNNMemory")
        keys, values, _ = state_parts(state)
        check_configuration(configuration, keys)
        memory = cls(**{**memory_arguments(configuration, keys, values), **overrides}, device=device)
        memory.load_state_dict(state)
        return memory

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks is not None:
            raise TypeError("a sharded memory must be copied by its state_dict, got a copy that has no process group")
        fields = {name: value for name, value in self.__dict__.items() if name not in NOT_PICKLED}
        return {"fields": fields, "device": self.device, "state": None if self._ring is None else self.state_dict()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.grows = self.keep_ids = False  # of a pickle that does not say so
        self._cleared = None
        self.__dict__.update({"value_dim": pickled["fields"]["dim"], **pickled["fields"]})
        self.made_in, self._announcement = running_backward(), announcement()
        self.watch = Watch()
        self._forget_storage()
        if pickled["state"] is not None:
            self._prepare(pickled["state"]["keys"].device, 0)  # where `map_location` put them
            self.load_state_dict(pickled["state"])
