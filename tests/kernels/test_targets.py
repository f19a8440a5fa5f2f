"""Every Triton kernel compiles for every GPU that it is promised for, and fits it; no GPU is needed."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cases import SHAPES, random_attention
from helpers.devices import seeded
from helpers.scripts import benchmark_script

pytest.importorskip("triton")
PORTABILITY = benchmark_script("portability")
TARGETS = list(PORTABILITY.TARGETS)
MOST_STACK = 512  # bytes a thread that may spill; the query gradient of float32 at D 128 is known for more
MAIN, WHOLE = PORTABILITY.MAIN_SEARCHES, PORTABILITY.SEARCHES


def assert_fits(kernels: list, target: str) -> None:
    room = PORTABILITY.TARGETS[target].shared_kilobytes * 1024
    for kernel in kernels:
        assert kernel.shared <= room, f"{kernel.name} takes {kernel.shared} bytes of shared memory of {room}"
        assert kernel.stack <= MOST_STACK, f"{kernel.name} spills {kernel.stack} bytes a thread"


def assert_products_agree(kernels: list) -> None:
    """What is scored again must be the same bits: the same kind of instruction sums in the same order.

    An H100 multiplies large and small tiles by different instructions, whose sums are equal bit for bit, which
    tests/gpu/test_gpu_triton_search.py sees.
    """
    families = {kernel.name: kernel.family for kernel in kernels if kernel.products}
    maxima, scored = families.get("knn_maxima_kernel"), families.get("knn_score_kernel")
    assert maxima == scored or maxima[0].startswith("wgmma"), f"{maxima} and {scored}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_the_search_of_float16_keys_compiles_and_fits(target: str) -> None:
    kernels = PORTABILITY.search_kernels(target, MAIN[0])
    assert {kernel.name for kernel in kernels} >= {"knn_maxima_kernel", "knn_choose_kernel", "knn_best_kernel"}
    assert_fits(kernels, target)
    assert_products_agree(kernels)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", WHOLE[1:], ids=lambda case: case.name)
def test_every_search_compiles_and_fits(case, target: str) -> None:
    kernels = PORTABILITY.search_kernels(target, case)
    assert_fits(kernels, target)
    assert_products_agree(kernels)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_every_other_kernel_compiles_and_fits(target: str) -> None:
    kernels = PORTABILITY.other_kernels(target)
    assert {kernel.name for kernel in kernels} >= {"add_near_tiles_kernel", "bias_gradient_kernel"}  # either way
    assert_fits(kernels, target)


def test_a_kernel_that_takes_more_than_a_target_has_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = PORTABILITY.Kernel("knn_maxima_kernel", 100 * 1024, 4, 255, 0, ())
    assert_fits([kernel], "sm_90")
    with pytest.raises(AssertionError, match="takes 102400 bytes of shared memory of 101376"):
        assert_fits([kernel], "sm_86")
    with pytest.raises(AssertionError, match="spills 1208 bytes"):
        assert_fits([kernel._replace(stack=1208)], "sm_90")


def test_other_instructions_for_the_same_products_are_seen() -> None:
    large = PORTABILITY.Kernel("knn_maxima_kernel", 0, 4, 0, 0, ("tcgen05.mma.cta_group::1.kind::f16",))
    small = PORTABILITY.Kernel("knn_score_kernel", 0, 1, 0, 0, ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",))
    with pytest.raises(AssertionError, match="tcgen05"):
        assert_products_agree([large, small])


def test_no_addition_between_lanes_takes_a_product_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """a·b + c·d rounds the product that another lane sent, not its own: two lanes would have two sums, and both write
    theirs to one place. racecheck saw it where rows are as wide as a warp."""
    from memtrans_kernels.attention_inputs import AttentionInputs
    from memtrans_kernels.impl.triton.memory_attention_backward import memory_attention_backward

    texts: dict[str, str] = {}
    monkeypatch.setattr(PORTABILITY, "_kernel", lambda name, compiled, _: texts.update({name: compiled.asm["ptx"]}))
    inputs = random_attention(SHAPES["tiles that line up, far ones too"], torch.bfloat16, seeded(0))
    query, lse = inputs["query"], torch.empty(inputs["query"].shape[:3])
    with (
        PORTABILITY.said_to_be("sm_90", "attention_tiles"),
        PORTABILITY.compiled_instead(PORTABILITY.TARGETS["sm_90"], "sm_90"),
    ):
        memory_attention_backward(AttentionInputs(**inputs), query, lse, query, lse)
    text = texts["query_gradient_kernel"]
    sent = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", text))
    added = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", text)
    assert sent and added and not sent.intersection(added)
