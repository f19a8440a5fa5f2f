"""A GPU is its vendor, capability and shared memory to the Triton search; the smallest tiles serve an unknown one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.targets import INTERPRETER, Target, from_properties, target_of

pytest.importorskip("triton")
KILOBYTE = 1024


def nvidia(major: int, minor: int, kilobytes: int) -> Target:
    properties = SimpleNamespace(
        major=major, minor=minor, shared_memory_per_block_optin=kilobytes * KILOBYTE, multi_processor_count=100
    )
    return from_properties(properties, amd=False)


def amd(name: str, kilobytes: int, major: int = 9, minor: int = 4) -> Target:
    properties = SimpleNamespace(
        major=major, minor=minor, gcnArchName=name, shared_memory_per_block=kilobytes * KILOBYTE,
        multi_processor_count=304,
    )  # fmt: skip
    return from_properties(properties, amd=True)


TARGETS = {
    "A100": nvidia(8, 0, 163),
    "A10": nvidia(8, 6, 99),
    "4090": nvidia(8, 9, 99),
    "H100": nvidia(9, 0, 227),
    "B200": nvidia(10, 0, 227),
    "5090": nvidia(12, 0, 99),
    "MI250": amd("gfx90a:sramecc+:xnack-", 64, 9, 0),
    "MI300": amd("gfx942:sramecc+:xnack-", 64),
    "MI355": amd("gfx950", 160, 9, 5),
    "7900": amd("gfx1100", 64, 11, 0),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [8, 64, 128, 200, 256, 768, 2048])
def test_every_target_has_a_tile_for_every_width(name: str, itemsize: int, width: int) -> None:
    """Of the operands alone; what a compiled kernel takes, test_targets.py asks the compiler."""
    target = TARGETS[name]
    tile = configs.search_tile(target, itemsize, width)
    columns = min(configs.power_of_two(max(width, 16)), tile.columns)
    operands = (tile.queries + tile.stages * tile.keys) * columns * itemsize
    assert operands <= target.shared_memory
    launch = configs.search(target, itemsize, width, 65536, 32, 4096)
    assert launch.keys % (8 * launch.run) == 0, "a tile is whole groups of eight runs"
    assert launch.scored <= launch.neighbours * launch.run


def test_the_vendor_comes_before_the_capability() -> None:
    """ROCm says 9.4 of an MI300, which is no Hopper."""
    assert TARGETS["MI300"] == Target("amd", 942, 64 * KILOBYTE, 304)
    assert TARGETS["MI250"].architecture == 0x90A
    hopper, other = (configs.search(TARGETS[name], 4, 64, 65536, 32, 4096) for name in ("H100", "MI300"))
    assert (hopper.precision, other.precision) == ("three", "ieee")
    assert not hopper.options and other.options


def test_an_unknown_gpu_gets_the_smallest_tiles() -> None:
    unknown = Target("intel", 20, 1 << 20)
    for itemsize, width in ((2, 64), (2, 256), (4, 256)):
        smallest = configs.search_tile(TARGETS["7900"], itemsize, width)
        assert configs.search_tile(unknown, itemsize, width) == smallest
    assert configs.search_precision(unknown, 4, 64) == "ieee"
    assert configs.search_precision(nvidia(7, 5, 64), 4, 64) == "ieee"


def test_more_shared_memory_never_gets_smaller_tiles() -> None:
    for itemsize, width in ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128)):
        tiles = [configs.search_tile(nvidia(8, 0, kilobytes), itemsize, width) for kilobytes in (64, 99, 163, 227)]
        assert tiles == sorted(tiles, key=lambda tile: tile.queries * tile.keys * min(tile.columns, width))


@pytest.mark.parametrize("queries", [1, 64, 65, 4096])
def test_a_step_of_its_own_looks_for_hidden_keys_where_many_programs_share_them(queries: int) -> None:
    launch = configs.search(TARGETS["H100"], 2, 64, 65536, 32, queries)
    assert launch.shown == (queries > configs.SEARCH_FEW_QUERIES)
    assert launch.shown or launch.queries >= queries


def test_large_tiles_on_a_blackwell_are_scored_by_large_tiles_too() -> None:
    """Its fifth generation of tensor cores is another unit than the one that multiplies a few rows."""
    launch = configs.search(TARGETS["B200"], 2, 64, 65536, 32, 4096)
    assert launch.score_warps == 4 and launch.scored >= 128 and launch.columns >= 16


def test_the_cpu_is_interpreted() -> None:
    assert target_of(torch.device("cpu")) is INTERPRETER
    assert configs.search(INTERPRETER, 2, 64, 100, 4, 8).precision == "elements"
