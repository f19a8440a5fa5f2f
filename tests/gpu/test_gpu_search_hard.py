"""The Hopper search is exact, and puts equal keys in order, whatever the keys: on its fast path and on its worst."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.devices import about_the_cuda_module, seeded
from helpers.hard_keys import KINDS, hard_keys, queries_near, sampled_slots
from helpers.rings import assert_exact, memory, search
from torch.nn.functional import normalize

from memtrans_kernels.backends import SEARCH_WIDTHS

pytestmark = [pytest.mark.gpu, about_the_cuda_module]

NAN, INF = float("nan"), float("inf")
SAMPLE_BLOCK = 1024  # slots of which one in eight at most is sampled


def check(entries, capacity, k, queries, *, spare=0, hidden=INF) -> torch.Tensor:
    """Searches every row of a ring for queries (rows, N, D), checks each answer and returns the slots."""
    held = memory(entries, capacity, spare, hidden=hidden)
    query, rows = queries[:, None], list(range(held.rows))
    scores, slots = search(query, held, k, "native")
    assert_exact(query, held, rows, scores, slots, k)
    again = search(query, held, k, "native")
    assert torch.equal(scores, again[0]) and torch.equal(slots, again[1]), "the same inputs give the same bits"
    return slots


@pytest.mark.parametrize("length", [1, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_keys_in_a_ring_that_has_wrapped(kind: str, length: int) -> None:
    keys = [hard_keys(kind, count, 64, torch.float16, count) for count in (7000, 9100)]
    queries = torch.stack([queries_near(rows, length) for rows in keys])
    check([(0, keys[0]), (6000, keys[1])], 5000, 32, queries, spare=70)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", SEARCH_WIDTHS)
@pytest.mark.parametrize("kind", ["periodic", "equal", "late"])
def test_every_width_and_dtype_of_hard_keys(kind: str, width: int, dtype: torch.dtype) -> None:
    keys = hard_keys(kind, 6000, width, dtype)
    check([(0, keys)], 5500, 32, queries_near(keys, 60)[None], spare=9)


@pytest.mark.parametrize("k", [1, 2, 31, 33, 64, 100, 128])
@pytest.mark.parametrize("kind", ["vocabulary", "equal", "ascending", "late"])
def test_every_number_of_neighbours_of_hard_keys(kind: str, k: int) -> None:
    keys = hard_keys(kind, 12000, 64, torch.float16)
    check([(0, keys)], 12000, k, queries_near(keys, 50)[None])


@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("k", [32, 128])
@pytest.mark.parametrize("period", [1, 3, 8, 64, 512, 1000, 2048])
def test_keys_that_come_again_after_so_many(period: int, k: int, spare: int) -> None:
    """Some stand in the same columns of every tile, which one of four lists takes before lists turn."""
    keys = hard_keys("random", period, 64, torch.float16).repeat(-(-9100 // period), 1)[:9100]
    check([(0, keys)], 8000, k, queries_near(keys, 60)[None], spare=spare)


@pytest.mark.parametrize("k", [1, 32, 128])
@pytest.mark.parametrize("different", [2, 5, 40])
def test_a_few_different_keys_in_any_order(different: int, k: int) -> None:
    few = hard_keys("random", different, 64, torch.float16)
    keys = few[torch.randint(different, (9100,), generator=seeded(different))]
    check([(0, keys)], 8000, k, queries_near(keys, 60)[None], spare=512)


@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("k", [1, 32, 128])
@pytest.mark.parametrize("better", [4, 16, 64])
def test_copies_that_a_few_keys_surpass(better: int, k: int, spare: int) -> None:
    """K keys reach the score of hundreds of copies, a few of which are neighbours beside the keys that are nearer."""
    few, noise = (hard_keys("random", count, 64, torch.float32, count) for count in (20, 60))
    direction = hard_keys("random", 1, 64, torch.float32)
    rise = torch.linspace(0, 1, 9100) * (torch.arange(9100) % better == 0)
    keys = normalize(few[torch.randint(20, (9100,), generator=seeded(better))] + rise[:, None] * direction, dim=-1)
    queries = normalize(few.repeat(3, 1) + direction + 0.4 * noise, dim=-1)
    check([(0, keys.half())], 8000, k, queries.half()[None], spare=spare)


@pytest.mark.parametrize("k", [1, 32, 128])
def test_neighbours_that_stand_where_no_sample_is_taken(k: int) -> None:
    """All of the last entries reach the queries' thresholds: lists hold more records than are chosen from at once."""
    keys = hard_keys("random", 8192, 64, torch.float16)
    keys[-500:] = hard_keys("runs", 500, 64, torch.float16, 1)
    check([(0, keys)], 8192, k, queries_near(keys[-500:], 60)[None], spare=512)


@pytest.mark.parametrize("k", [32, 128])
@pytest.mark.parametrize("count", [16384, 70000])
@pytest.mark.parametrize("better", ["sampled", "others"])
def test_keys_that_deceive_the_sample(better: str, count: int, k: int) -> None:
    """Thresholds are too high for every query, or so low that most keys reach them and lists fill again and again."""
    direction = hard_keys("random", 1, 64, torch.float32)
    lifted = sampled_slots(count) if better == "sampled" else ~sampled_slots(count)
    if better == "sampled":  # few of them, so that fewer than K keys reach a threshold that takes them for a sample
        lifted &= torch.arange(count) // SAMPLE_BLOCK % 16 == 5
        lifted &= torch.rand(count, generator=seeded(1)) < 0.1
    rise = torch.linspace(1, 3, count) * lifted
    keys = rise[:, None] * direction + 0.02 * hard_keys("random", count, 64, torch.float32, 2)
    queries = (direction + 0.05 * hard_keys("random", 300, 64, torch.float32, 3)).half()
    check([(0, keys.half())], count, k, queries[None])


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_some_queries_that_are_hard_among_others(share: float) -> None:
    keys = hard_keys("random", 20000, 64, torch.float16)
    keys[7000:15000] = hard_keys("ascending", 8000, 64, torch.float16, 5)
    near = queries_near(keys[7000:15000], 700, 2)
    others = queries_near(keys[:7000], 700, 3)
    hard = torch.rand(700, generator=seeded(4)) < share
    check([(0, keys)], 20000, 32, torch.where(hard[:, None], near, others)[None])


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("kind", ["random", "equal", "late"])
def test_hard_keys_that_are_not_finite_are_never_retrieved(kind: str, length: int) -> None:
    keys = hard_keys(kind, 9000, 64, torch.float16)
    for number, seed in ((NAN, 3), (INF, 4), (-INF, 5)):
        keys[torch.rand(9000, generator=seeded(seed)) < 0.3, seed] = number
    finite = keys[keys.isfinite().all(dim=-1)]
    check([(0, keys)], 8000, 32, queries_near(finite, length)[None], spare=5, hidden=NAN)


def test_equal_keys_stay_in_order_when_one_of_two_ranks_finds_a_query_hard() -> None:
    """Each rank holds half of the keys; scores of equal keys must be the same bits, however hard the rest is there."""
    shared = hard_keys("random", 40, 64, torch.float16)
    queries = queries_near(shared, 100)[None, None]
    halves = [hard_keys(kind, 8192, 64, torch.float16, 7) for kind in ("random", "equal")]
    found = []
    for half in halves:
        half[100:140] = shared
        scores, slots = (tensor[0, 0].cpu() for tensor in search(queries, memory([(0, half)], 8192), 128, "native"))
        of_shared = (slots >= 100) & (slots < 140)
        query = torch.arange(100, device="cpu")[:, None].expand_as(slots)
        places = zip(query[of_shared].tolist(), slots[of_shared].tolist(), strict=True)
        found.append(dict(zip(places, scores[of_shared].tolist(), strict=True)))
    both = found[0].keys() & found[1].keys()
    assert len(both) >= 100
    assert all(found[0][place] == found[1][place] for place in both)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_kinds_and_shapes(seed: int) -> None:
    draw = random.Random(seed)
    capacity, width = draw.randint(1, 9000), draw.choice(SEARCH_WIDTHS)
    dtype, k = draw.choice([torch.float16, torch.bfloat16]), draw.randint(1, 128)
    rows = []
    for _ in range(draw.randint(1, 3)):
        count, kind = draw.randint(1, 2 * capacity), draw.choice(list(KINDS))
        rows.append((draw.choice([0, 0, count // 2]), hard_keys(kind, count, width, dtype, seed)))
    length = draw.choice([1, 9, 40, 200])
    queries = torch.stack([queries_near(keys, length) for _, keys in rows])
    check(rows, capacity, k, queries, spare=draw.randint(0, 300))
