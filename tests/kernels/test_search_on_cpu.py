"""The Hopper search's lists, thresholds and selections are exact: one warp of its source, compiled for a CPU.

What only a GPU shows, loads, products, several warps and what nvcc makes of the source, tests/gpu has. Here each lane
runs for itself until lanes meet, in an order by chance, over memory full of noise: `on_cpu/`.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.devices import seeded
from helpers.hard_keys import KINDS, hard_keys, queries_near, sampled_slots
from torch import Tensor
from torch.nn.functional import normalize

from building import common

FOLDER = Path(__file__).resolve().parent / "on_cpu"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
INF = float("inf")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="lanes are fibers of POSIX")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("on_cpu") / "search.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{FOLDER}", f"-I{SOURCES}"]
    command = [*common.compiler(), *flags, str(FOLDER / "search.cpp"), "-o", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return ctypes.CDLL(str(target))


def check(
    library: ctypes.CDLL, keys: Tensor, queries: Tensor, capacity: int, k: int, spare: int = 0, begin: int = 0,
    parts: int = 1,
) -> int:  # fmt: skip
    """Searches the last of keys (C, D), in a ring, for up to 16 queries (Q, D); returns how many were given up."""
    slots, count = capacity + spare, len(keys)
    oldest = max(begin, count - capacity)
    visible = torch.arange(oldest, count)
    is_finite = torch.ones(slots, dtype=torch.uint8)
    is_finite[visible % slots] = keys[visible].isfinite().all(dim=1).byte()
    table = torch.full((len(queries), slots), INF)  # hidden slots hold anything
    table[:, visible % slots] = scores_of(queries, keys[visible])
    scores, found = torch.full((len(queries), k), 7.0), torch.full((len(queries), k), 7, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (table, is_finite, scores, found)]
    given_up = library.search_scores(
        *pointers[:2], len(queries), slots, ctypes.c_int64(begin), ctypes.c_int64(count), capacity, k,
        parts, ctypes.c_uint64(count + k), *pointers[2:],
    )  # fmt: skip
    assert given_up >= 0, "lanes of a warp do not meet"
    expected_scores, expected = nearest(table[:, visible % slots], visible % slots, is_finite.bool(), k)
    assert torch.equal(found.long(), expected)
    assert torch.equal(scores, expected_scores)
    return given_up


def scores_of(queries: Tensor, keys: Tensor) -> Tensor:
    """(Q, C), of equal keys the same bits: a sum in order, as no library promises."""
    products = queries.float()[:, :, None] * keys.float().T[None]  # (Q, D, C)
    total = products[:, 0].clone()
    for number in products[:, 1:].unbind(1):
        total += number
    return total


def nearest(scores: Tensor, slots: Tensor, is_finite: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of scores (Q, C), old to new, the older one of equals first; -inf and -1 where there are fewer."""
    shown = is_finite[slots]
    ordered, place = scores[:, shown].sort(dim=1, descending=True, stable=True)
    best_scores, best = torch.full((len(scores), k), -INF), torch.full((len(scores), k), -1)
    most = min(k, int(shown.sum()))
    best_scores[:, :most], best[:, :most] = ordered[:, :most], slots[shown][place[:, :most]]
    return best_scores, best


def test_lanes_that_part_and_barriers_that_lack_are_noticed(library: ctypes.CDLL) -> None:
    assert library.notices_lanes_that_part() == 1
    assert library.runs_that_a_race_changes() > 0


@pytest.mark.parametrize("k", [1, 32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_keys_in_a_ring_that_has_wrapped(library: ctypes.CDLL, kind: str, k: int) -> None:
    keys = hard_keys(kind, 3900, 8, torch.float16)
    check(library, keys, queries_near(keys, 16), 3000, k, spare=70)


@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("period", [1, 3, 8, 64, 1000])
def test_keys_that_come_again_after_so_many(library: ctypes.CDLL, period: int, spare: int) -> None:
    keys = hard_keys("random", period, 16, torch.float16).repeat(-(-4500 // period), 1)[:4500]
    check(library, keys, queries_near(keys, 16), 4000, 128, spare)


@pytest.mark.parametrize("k", [1, 32, 128])
@pytest.mark.parametrize("better", [4, 64])
def test_copies_that_a_few_keys_surpass(library: ctypes.CDLL, better: int, k: int) -> None:
    few, noise = (hard_keys("random", count, 16, torch.float32, count) for count in (10, 16))
    direction = hard_keys("random", 1, 16, torch.float32)
    rise = torch.linspace(0, 1, 4600) * (torch.arange(4600) % better == 0)
    keys = normalize(few[torch.randint(10, (4600,), generator=seeded(better))] + rise[:, None] * direction, dim=-1)
    queries = normalize(few.repeat(2, 1)[:16] + direction + 0.4 * noise, dim=-1)
    check(library, keys.half(), queries.half(), 4000, k, spare=9)


@pytest.mark.parametrize("k", [1, 32, 128])
@pytest.mark.parametrize("scores", ["random", "few", "equal", "rising", "infinite"])
def test_a_cut_leaves_the_nearest_of_each_query_and_no_list_gets_longer(
    library: ctypes.CDLL, scores: str, k: int
) -> None:
    draw = seeded(k)
    lengths = torch.randint(113, (32,), generator=draw, dtype=torch.int32) * (torch.arange(32) % 5 > 0)
    pairs = torch.rand(8, 4 * 128, generator=draw).argsort(dim=1).reshape(32, 128).sort(dim=1).values  # each slot once
    pairs[torch.arange(128) >= lengths[:, None]] = -(2**29)  # as memory that was never written may be
    values = {
        "random": torch.randn(32, 128, 2, generator=draw),
        "few": torch.randint(5, (32, 128, 2), generator=draw).float() - 2,
        "equal": torch.zeros(32, 128, 2),
        "rising": pairs[..., None] + torch.randn(32, 128, 2, generator=draw),
        "infinite": torch.randn(32, 128, 2, generator=draw).masked_fill(
            torch.rand(32, 128, 2, generator=draw) < 0.2, INF
        ),
    }[scores]
    values[..., 1].masked_fill_(torch.rand(32, 128, generator=draw) < 0.5, -INF)  # one of two is no hit, as mostly
    records = torch.cat([values, pairs.int().view(torch.float32)[..., None], torch.zeros(32, 128, 1)], dim=2)
    before, length_before, bounds = records.clone(), lengths.clone(), torch.full((32,), 7.0)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (records, lengths, bounds)]
    library.cut_lists(pointers[0], pointers[1], k, 1024, pointers[2])
    assert (lengths <= length_before).all()
    for query in range(8):
        listed, left = entries(before, length_before, query), entries(records, lengths, query)
        finite = sorted((-score, slot) for score, slot in listed if score < INF)
        assert set(left) <= set(listed) and len(set(left)) == len(left)
        assert {(-score, slot) for score, slot in finite[:k]} <= set(left)
        assert {entry for entry in listed if entry[0] == INF} <= set(left)
        assert sum(-score >= float(bounds[4 * query]) for score, _ in finite) >= min(k, len(finite))
        if scores == "equal" and len(finite) > 4 * k:
            assert len(left) < 3 * len(listed) / 4, "the older ones of equal keys are enough"


def entries(records: Tensor, lengths: Tensor, query: int) -> list[tuple[float, int]]:
    """{score, slot} of what is in the four lists of a query, of records (32, R, 4)."""
    pairs = records[..., 2].contiguous().view(torch.int32)
    places = [(lane, i, c) for lane in range(4 * query, 4 * query + 4) for i in range(lengths[lane]) for c in range(2)]
    both = [(float(records[lane, i, c]), 2 * int(pairs[lane, i]) + c) for lane, i, c in places]
    return [entry for entry in both if entry[0] > -INF]


@pytest.mark.parametrize(("parts", "k"), [(1, 128), (1, 32), (2, 128)])
def test_queries_that_are_given_up_are_searched_again(library: ctypes.CDLL, parts: int, k: int) -> None:
    """Keys get better where no sample is taken: thresholds are so low that lists fill up again and again."""
    rise = torch.linspace(1, 3, 12000) * ~sampled_slots(12000)
    keys = rise[:, None] + 0.02 * torch.randn(12000, 4, generator=seeded(2))
    assert check(library, keys, torch.rand(16, 4, generator=seeded(3)) + 0.1, 12000, k, parts=parts) > 0


@pytest.mark.parametrize("kind", ["random", "equal", "late"])
def test_keys_that_are_not_finite_are_never_retrieved(library: ctypes.CDLL, kind: str) -> None:
    keys = hard_keys(kind, 2600, 8, torch.float16)
    queries = queries_near(keys, 16).abs()
    keys[torch.rand(2600, generator=seeded(3)) < 0.3, 0] = INF
    check(library, keys, queries, 2500, 32, spare=5)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_shapes(library: ctypes.CDLL, seed: int) -> None:
    draw = random.Random(seed)
    capacity = int(2 ** draw.uniform(0, 12.3))
    count = draw.choice([draw.randint(1, 2 * capacity), capacity, 1 + capacity // 2])
    kinds: list[Callable[[], Tensor]] = [
        lambda: hard_keys(draw.choice(list(KINDS)), count, 8, torch.float16, seed),
        lambda: hard_keys("random", 1 + draw.randrange(60), 8, torch.float16)[
            torch.randint(1, (count,), generator=seeded(seed))
        ],
    ]
    keys = draw.choice(kinds)()
    queries = queries_near(keys, draw.randint(1, 16), seed)
    begin = draw.choice([0, 0, draw.randint(0, count)])
    k, spare, parts = draw.randint(1, 128), draw.randint(0, 300), draw.choice([1, 1, 2, 5])
    check(library, keys, queries, capacity, k, spare, begin, parts)
