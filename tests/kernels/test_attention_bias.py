"""A bias by distance: tiles that the gradient of keys leaves for its own, and how far it is laid out."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.attention_bias import near_tiles_of
from memtrans_kernels.impl.triton.targets import INTERPRETER, Target

BLOCK = 64


def shape_of_tiles(distances: int, length: int = 128, local_keys: int = 192) -> tuple[int, ...] | None:
    shared = {
        "query": torch.empty(1, dtype=torch.bfloat16).expand(2, 3, length, 64), "length": length,
        "local_keys": local_keys, "heads": 3, "WIDTH": 64, "VALUE_WIDTH": 64, "CAUSAL": True,
    }  # fmt: skip
    near = near_tiles_of(torch.empty(3, distances), 2, shared)
    return None if near is None else tuple(near.tiles.shape)


@pytest.mark.parametrize(("distances", "places"), [(2, 2), (65, 2), (66, 3), (129, 3)])
def test_a_place_is_a_tile_that_a_diagonal_of_the_table_crosses(distances, places):
    assert shape_of_tiles(distances) == (2, 3, 2, places, BLOCK, BLOCK)


@pytest.mark.parametrize(("length", "local_keys"), [(127, 191), (128, 191), (128, 64), (0, 64), (2**24, 2**24)])
def test_there_are_none_where_tiles_do_not_line_up_or_cannot_be_counted(length, local_keys):
    assert shape_of_tiles(129, length, local_keys) is None


def test_there_are_none_where_all_keys_are_far():
    assert shape_of_tiles(1) is None


def test_a_long_table_does_not_take_the_memory_of_dense_attention():
    longest = (configs.NEAR_PLACES - 1) * BLOCK + 1
    assert shape_of_tiles(longest) == (2, 3, 2, configs.NEAR_PLACES, BLOCK, BLOCK)
    assert shape_of_tiles(longest + 1) is None


@pytest.mark.parametrize("target", [INTERPRETER, Target("nvidia", 90, 227 << 10), Target("amd", 1100, 64 << 10)])
def test_no_tile_is_larger_than_biases_are_laid_out_for(target):
    """Addresses of a tile's biases have no masks."""
    for itemsize, width, length, neighbours in itertools.product((2, 4), (16, 64, 128, 256), (1, 16, 512), (0, 32)):
        tiles = [
            configs.attention_query_gradient(target, itemsize, width, length, neighbours),
            configs.attention_key_gradient(target, itemsize, width),
            configs.attention_bias_gradient(target, itemsize, width),
            *(
                configs.attention_forward(target, itemsize, width, length, local, neighbours)
                for local in (1, 512, 8192)
            ),
        ]
        assert all(max(tile.queries, tile.keys) <= configs.LARGEST_TILE for tile in tiles)
