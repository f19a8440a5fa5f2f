"""Whatever is done to a memory, each document holds what a `collections.deque(maxlen=M)` would hold, in that order."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections import deque
from pathlib import Path

import torch
from helpers.devices import seeded
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from memtrans import KNNMemory, KNNMemoryList

WIDTH = 3
Entry = tuple[tuple[float, ...], tuple[float, ...]]  # key and value


def tuples(tensor: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in tensor.tolist()]


class MemoryMachine(RuleBasedStateMachine):
    """Random operations on a `KNNMemory` and on a deque of (key, value) for each document and key/value head."""

    @initialize(
        batch=st.integers(1, 3),
        capacity=st.integers(1, 9),
        spare=st.integers(0, 3),
        kv_heads=st.sampled_from([1, 1, 2]),
    )
    def create(self, batch: int, capacity: int, spare: int, kv_heads: int) -> None:
        self.batch, self.kv_heads, self.added = batch, kv_heads, 0
        self.memory = KNNMemory(WIDTH, capacity, batch, spare=spare, kv_heads=kv_heads)
        self.model = [[deque(maxlen=capacity) for _ in range(kv_heads)] for _ in range(batch)]
        self.scopes = [list(range(batch))]

    @property
    def scope(self) -> list[int]:
        return self.scopes[-1]

    # ------------------------------------------------------------------------------------------------ add, clear

    @rule(length=st.integers(0, 12), seed=st.integers(0, 999), counted=st.booleans())
    def add(self, length: int, seed: int, counted: bool) -> None:
        """Few different keys, so that many are equal; every value is another one. Lengths beyond the capacity too."""
        generator = seeded(seed)
        shape = (len(self.scope), self.kv_heads, length, WIDTH)
        keys = torch.randint(-1, 2, shape, generator=generator).float()
        values = self.added + torch.arange(keys.numel()).reshape(shape).float()
        self.added += keys.numel()
        count = torch.randint(0, length + 1, (len(self.scope),), generator=generator) if counted else None
        pairs = torch.stack((keys, values), dim=-2)
        self.memory.add(pairs if self.kv_heads > 1 else pairs[:, 0], count)
        for place, document in enumerate(self.scope):
            stored = length if count is None else int(count[place])
            for head in range(self.kv_heads):
                of_head = zip(tuples(keys[place, head, :stored]), tuples(values[place, head, :stored]), strict=True)
                self.model[document][head].extend(of_head)

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        """Absolute, whatever the scope."""
        some = st.lists(st.integers(0, self.batch - 1), unique=True)
        indices = data.draw(some | st.none() | st.integers(0, self.batch - 1), "batch_indices")
        self.memory.clear(indices)
        cleared = range(self.batch) if indices is None else [indices] if isinstance(indices, int) else indices
        self.forget(list(cleared))

    @rule(data=st.data())
    def clear_rows(self, data: st.DataObject) -> None:
        """Relative to the scope."""
        mask = data.draw(st.lists(st.booleans(), min_size=len(self.scope), max_size=len(self.scope)), "mask")
        self.memory.clear_rows(torch.tensor(mask))
        self.forget([document for document, cleared in zip(self.scope, mask, strict=True) if cleared])

    def forget(self, documents: list[int]) -> None:
        for document in documents:
            for entries in self.model[document]:
                entries.clear()

    # ---------------------------------------------------------------------------------------------------- scopes

    @rule(data=st.data())
    def enter_scope(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, self.batch), "size")
        scope = data.draw(st.permutations(range(self.batch)), "scope")[:size]
        self.memory.set_scoped_indices(scope)
        self.scopes.append(scope)

    @precondition(lambda self: len(self.scopes) > 1)
    @rule()
    def leave_scope(self) -> None:
        self.scopes.pop()
        self.memory.set_scoped_indices(self.scope)

    @rule(data=st.data(), length=st.integers(1, 3), seed=st.integers(0, 999))
    def add_in_a_scope(self, data: st.DataObject, length: int, seed: int) -> None:
        outer = self.scope
        scope = data.draw(st.permutations(range(self.batch)), "scope")[:1]
        with self.memory.at_batch_indices(scope):
            self.scopes.append(scope)
            self.add(length, seed, False)
            self.scopes.pop()
        assert self.memory.scoped_indices == outer

    # ------------------------------------------------------------------------------------------- copies and files

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "memory.safetensors"
            self.memory.save(path)
            self.memory = KNNMemory.load(path)
        self.memory.set_scoped_indices(self.scope)

    @rule()
    def pickle(self) -> None:
        self.memory = pickle.loads(pickle.dumps(self.memory))

    @rule()
    def deepcopy(self) -> None:
        """The copy goes on; what is left behind is used, and that must not show."""
        left, self.memory = self.memory, copy.deepcopy(self.memory)
        left.clear()
        heads = () if self.kv_heads == 1 else (self.kv_heads,)
        left.add(torch.full((len(self.scope), *heads, 4, 2, WIDTH), -7.0))

    @rule(capacity=st.integers(1, 9), spare=st.integers(0, 3))
    def load_into_another_capacity(self, capacity: int, spare: int) -> None:
        """The newest entries stay."""
        other = KNNMemory(WIDTH, capacity, self.batch, spare=spare, kv_heads=self.kv_heads)
        other.load_state_dict(self.memory.state_dict())
        other.set_scoped_indices(self.scope)
        self.memory = other
        self.model = [[deque(entries, maxlen=capacity) for entries in document] for document in self.model]

    @rule()
    def load_its_own_state(self) -> None:
        memories = KNNMemoryList([self.memory])
        state = memories.state_dict()
        self.memory.clear()
        memories.load_state_dict(state)

    # -------------------------------------------------------------------------------------------------- contents

    def entries(self, document: int, head: int) -> list[Entry]:
        return list(self.model[document][head])

    @invariant()
    def the_state_is_every_deque_from_old_to_new(self) -> None:
        state = self.memory.state_dict()
        for document in range(self.batch):
            for head in range(self.kv_heads):
                row = document * self.kv_heads + head
                expected, width = self.entries(document, head), state["keys"].shape[1]
                first = width - int(state["lengths"][row])
                keys, values = tuples(state["keys"][row, first:]), tuples(state["values"][row, first:])
                assert list(zip(keys, values, strict=True)) == expected
            assert int(self.memory.lengths[document]) == len(expected)

    @rule(seed=st.integers(0, 999))
    def search_finds_everything(self, seed: int) -> None:
        """Asked for more than it holds: each pair once, best first, equal keys older first, then zeros and False."""
        generator = seeded(seed)
        queries = torch.randint(-2, 3, (len(self.scope), self.kv_heads, WIDTH), generator=generator).float()
        topk = self.memory.max_memories + 1
        key_values, mask = self.memory.search(queries if self.kv_heads > 1 else queries[:, 0], topk)
        key_values = key_values.reshape(len(self.scope), self.kv_heads, topk, 2, WIDTH)
        mask = mask.reshape(len(self.scope), self.kv_heads, topk)
        assert (key_values[~mask] == 0).all()
        for place, document in enumerate(self.scope):
            for head in range(self.kv_heads):
                expected = self.entries(document, head)
                found = key_values[place, head][mask[place, head]]
                got = list(zip(tuples(found[:, 0]), tuples(found[:, 1]), strict=True))
                assert sorted(got) == sorted(expected)
                scores = found[:, 0] @ queries[place, head]
                assert (scores.diff() <= 0).all()
                for key in {key for key, _ in expected}:
                    assert [pair for pair in got if pair[0] == key] == [pair for pair in expected if pair[0] == key]


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
