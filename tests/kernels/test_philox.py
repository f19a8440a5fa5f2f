"""Philox 4x32-10: the published vectors, and the dropout mask made of it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.devices import seeded

from memtrans_kernels.impl.reference.philox import keep_mask, philox

pytestmark = pytest.mark.device

LOW = 0xFFFFFFFF
ALL_ONES = (LOW,) * 4
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def signed(seed: int) -> int:
    """A 64-bit seed as the int64 that holds its bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def first_word(seed: int, counter: tuple[int, int, int, int]) -> int:
    words = tuple(torch.tensor(word) for word in counter)
    return int(philox(torch.tensor(signed(seed)), words))


def definition(seed: int, counter: tuple[int, int, int, int]) -> int:
    """The ten rounds of Salmon et al. 2011, in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, (seed & LOW, seed >> 32)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), 0x6627E8D5),
        ((1 << 64) - 1, ALL_ONES, 0x408F276D),
        (0x299F31D0A4093822, PI, 0xD16CFE09),
    ],
)
def test_the_known_answers_of_random123(seed: int, counter: tuple[int, int, int, int], expected: int) -> None:
    assert first_word(seed, counter) == expected


def test_any_counter_and_seed_give_the_definitions_number() -> None:
    generator = seeded(0)
    for _ in range(200):
        key0, key1, *counter = torch.randint(0, 1 << 32, (6,), generator=generator).tolist()
        seed = key1 << 32 | key0
        assert first_word(seed, tuple(counter)) == definition(seed, tuple(counter))


def test_a_mask_asks_with_the_counter_column_query_head_document() -> None:
    seed, p, shape = 2**40 + 5, 0.5, (2, 3, 4, 5)  # (B, H, N, columns)
    kept = keep_mask(torch.tensor(seed), p, shape)
    assert kept.shape == shape
    for document in range(2):
        for head in range(3):
            for query in range(4):
                for column in range(5):
                    number = definition(seed, (column, query, head, document))
                    assert bool(kept[document, head, query, column]) == (number >= 2**31)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_keep_rate_is_one_minus_p(p: float) -> None:
    kept = keep_mask(torch.tensor(1234), p, (4, 8, 64, 64))
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation


def test_without_dropout_everything_is_kept() -> None:
    assert keep_mask(torch.tensor(7), 0.0, (2, 2, 8, 8)).all()


def test_another_seed_draws_another_mask_and_the_same_one_the_same() -> None:
    shape = (1, 2, 16, 16)
    mask = keep_mask(torch.tensor(1), 0.5, shape)
    assert torch.equal(mask, keep_mask(torch.tensor(1), 0.5, shape))
    for other in (2, 1 << 32 | 1, -1):  # both halves of the seed count
        agreement = (mask == keep_mask(torch.tensor(other), 0.5, shape)).double().mean().item()
        assert 0.4 < agreement < 0.6
