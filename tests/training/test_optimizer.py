"""The learning rate warms up and decays, as either schedule says."""

from __future__ import annotations

import pytest

from memtrans.training.optimizer import learning_rate
from memtrans.training.settings import Settings


def test_the_papers_learning_rate_is_the_inverse_root_of_the_step():
    settings = Settings(schedule="inverse-sqrt", warmup=1000, learning_rate=3.0)
    rates = [learning_rate(settings, step) for step in range(5000)]
    assert rates.index(max(rates)) == 999
    assert rates[:1000] == [pytest.approx(3 / 1000**0.5 * (step + 1) / 1000) for step in range(1000)]
    assert rates[1000:] == [pytest.approx(3 / (step + 1) ** 0.5) for step in range(1000, 5000)]


def test_the_learning_rate_warms_up_and_decays():
    settings = Settings(steps=100, warmup=10, learning_rate=2.0, final_rate=0.1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:10] == [pytest.approx(0.2 * (step + 1)) for step in range(10)]
    assert rates[10] == max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.2)
