"""Arguments of upstream's that mean nothing here: accepted, with one warning that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.memories import filled

from memtrans import KNNMemory, KNNMemoryList, MemorizingTransformer


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: KNNMemory(2, 4, 1, "./knn.memory.memmap"), ["memmap_filename"]),
        (lambda: KNNMemory(2, 4, 1, multiprocessing=False), ["multiprocessing"]),
        (lambda: KNNMemory(2, 4, 1, "./file", True), ["memmap_filename", "multiprocessing"]),
        (lambda: filled(1).search(torch.ones(1, 2), 1, 8), ["nprobe"]),
        (lambda: filled(1).search(torch.ones(1, 2), 1, increment_hits=True), ["increment_hits"]),
        (lambda: filled(1).search(torch.ones(1, 2), 1, increment_age=False), ["increment_age"]),
        (
            lambda: KNNMemoryList.create_memories(batch_size=1, num_memory_layers=1, memories_directory="./.tmp"),
            ["memories_directory"],
        ),
    ],
)
def test_arguments_without_meaning_cause_one_warning_that_says_why(call: Callable[[], Any], names: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (warning,) = caught
    assert warning.category is DeprecationWarning
    assert warning.filename == __file__
    assert str(warning.message).startswith(", ".join(names) + ":")
    assert "ignored" in str(warning.message)
    assert "no files, no processes and no probes" in str(warning.message)


def test_a_list_of_memories_warns_once_for_what_it_ignores() -> None:
    create = KNNMemoryList.create_memories(batch_size=2, num_memory_layers=3)
    with pytest.warns(DeprecationWarning, match="multiprocessing: accepted for compatibility") as record:
        create(dim=4, multiprocessing=False)
    assert len(record) == 1


def test_a_model_warns_once_for_what_it_ignores() -> None:
    with pytest.warns(DeprecationWarning, match="knn_memories_directory.*no files, no processes") as record:
        MemorizingTransformer(
            num_tokens=9, dim=8, depth=1, knn_memories_directory="./memories", knn_memory_multiprocessing=True
        )
    assert len(record) == 1
