"""Upstream's import lines with the package's name replaced; what they import is what memtrans exports."""

from __future__ import annotations

import importlib

import pytest
import torch

import memtrans

NAMES = {
    "knn_memory": ("KNNMemory", "KNNMemoryList", "DEFAULT_KNN_MEMORY_MEMMAP_DIRECTORY"),
    "memorizing_transformers_pytorch": (
        *("Attention", "KNNAttention", "FeedForward", "PreNormResidual", "T5RelativePositionBias"),
        *("MemorizingTransformer", "KNNMemoryList", "l2norm"),
    ),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_22_2_a_name_is_found_where_upstream_has_it(module: str, name: str) -> None:
    ours = getattr(importlib.import_module(f"memtrans.{module}"), name)
    theirs = getattr(importlib.import_module(f"memorizing_transformers_pytorch.{module}"), name)
    assert ours is getattr(memtrans, name, ours)
    assert isinstance(ours, str) == isinstance(theirs, str)
    assert not isinstance(ours, str) or ours == theirs


def test_22_2_l2norm_is_upstreams() -> None:
    from memorizing_transformers_pytorch.memorizing_transformers_pytorch import l2norm as theirs

    from memtrans.memorizing_transformers_pytorch import l2norm

    vectors = torch.randn(3, 4)
    assert torch.equal(l2norm(vectors), theirs(vectors))
