"""Where the gradient of a bias by distance comes from tiles that the gradient of keys has left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from memtrans_kernels.impl.triton.attention_bias import near_tiles_of


def near_shape(
    distances: int, length: int = 512, local: int = 512, width: int = 64, causal: bool = True, batch: int = 2
) -> tuple[int, ...] | None:
    query = torch.empty(batch, 8, length, width, dtype=torch.bfloat16)
    shared: dict[str, Any] = {
        "query": query, "length": length, "local_keys": local, "heads": 8, "WIDTH": width, "VALUE_WIDTH": width,
        "CAUSAL": causal,
    }  # fmt: skip
    near = near_tiles_of(torch.empty(8, distances), batch, shared)
    return None if near is None else tuple(near.tiles.shape)


@pytest.mark.parametrize(("distances", "places"), [(2, 2), (65, 2), (66, 3), (128, 3), (193, 4)])
def test_a_tile_for_each_block_of_queries_and_of_the_keys_that_the_table_reaches(distances: int, places: int) -> None:
    assert near_shape(distances) == (2, 8, 8, places, 64, 64)


@pytest.mark.parametrize("distances", [194, 512, 4096])
def test_a_long_table_takes_no_matrix_of_all_pairs(distances: int) -> None:
    assert near_shape(distances) is None


@pytest.mark.parametrize(
    "changes",
    [{"length": 500}, {"local": 540}, {"local": 448}, {"causal": False}, {"batch": 0}, {"length": 0}],
    ids=str,
)
def test_what_does_not_line_up_is_computed_again(changes: dict[str, Any]) -> None:
    assert near_shape(**{"distances": 128, **changes}) is None


def test_a_table_of_one_column_has_no_near_keys() -> None:
    assert near_shape(1) is None
