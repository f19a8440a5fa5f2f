"""`auto` takes the fastest that can run; a named backend runs or says why not; nothing falls back in silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from memtrans_kernels import backends, knn_search, native
from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.backends import Implementation, backends_info, resolve
from memtrans_kernels.impl.reference import cosine, knn_add
from memtrans_kernels.impl.reference import knn_search as reference_search

SEARCH = (
    torch.zeros(1, 2, 3, 64, dtype=torch.float16),
    torch.zeros(1, 8, 64, dtype=torch.float16),
    torch.tensor([0]),
    torch.tensor([0]),
    torch.tensor([8]),
)
UNALIGNED = "keys must be contiguous and begin at a multiple of 16 bytes"


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """What can run here is asked anew, and again after the test."""
    backends._candidates.cache_clear()
    backends._warn_once.cache_clear()
    yield
    backends._candidates.cache_clear()


@pytest.fixture
def nothing_compiled(_forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda module="cpu": (False, f"the {module} module is not built"))


@pytest.fixture
def on_a_gpu(_forgotten: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for a CUDA tensor: `resolve` looks at its device alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return SimpleNamespace(device=torch.device("cuda"))


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_an_operator_runs_on_the_gpu_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, index: int, entered: list[int]
) -> None:
    """GPU 0 is the current one, and stays so without being asked for."""
    devices: list[int] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        devices.append(device.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(backends, "resolve", lambda *_: lambda tensor: list(devices))
    assert backends.run("cosine", "auto", SimpleNamespace(device=torch.device("cuda", index))) == entered


def test_auto_passes_on_to_the_next_one_when_the_first_is_missing(nothing_compiled: None) -> None:
    assert resolve("knn_search", "auto", *SEARCH, 8, 4) is reference_search.knn_search_on_host
    assert resolve("knn_add_", "auto", SEARCH[1]) is knn_add.knn_add_


def test_a_named_backend_that_cannot_run_says_why(nothing_compiled: None) -> None:
    with pytest.raises(
        RuntimeError, match=r"backend='native' cannot run knn_search on cpu: native: the cpu module is not"
    ):
        knn_search(*SEARCH, capacity=8, k=4, backend="native")
    with pytest.raises(
        RuntimeError, match="backend='triton' cannot run knn_search on cpu: triton: Triton runs on CPU tensors only in"
    ):
        knn_search(*SEARCH, capacity=8, k=4, backend="triton")


def test_the_environment_stands_in_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMTRANS_BACKEND", "reference")
    assert resolve("knn_add_", "auto", SEARCH[1]) is knn_add.knn_add_
    monkeypatch.setenv("MEMTRANS_BACKEND", "native")
    assert resolve("cosine", "auto", SEARCH[0]) is cosine.cosine, "native has no cosine"
    monkeypatch.setenv("MEMTRANS_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match="backend must be one of auto, reference, triton, native, faiss, got 'fastest'"
    ):
        resolve("knn_add_", "auto", SEARCH[1])


def test_plain_pytorch_on_a_gpu_is_announced_once(nothing_compiled: None, on_a_gpu: SimpleNamespace) -> None:
    wide = (on_a_gpu, SEARCH[1].double(), *SEARCH[2:], 8, 4)
    slow = "which is slow: native: the cuda module .* not in float64. Mend one of these reasons, or pass backend="
    with pytest.warns(RuntimeWarning, match=slow):
        resolve("knn_search", "auto", *wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("knn_search", "auto", *wide)
        resolve("knn_search", "reference", *wide)


def test_any_gpu_searches_in_triton_where_the_compiled_module_is_missing(
    nothing_compiled: None, on_a_gpu: SimpleNamespace
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for keys in (SEARCH[1], SEARCH[1].bfloat16(), SEARCH[1].float()):
            found = resolve("knn_search", "auto", on_a_gpu, keys, *SEARCH[2:], 8, 4)
            assert found.__module__ == "memtrans_kernels.impl.triton.knn_search"


@pytest.mark.parametrize(
    ("keys", "k", "reason"),
    [
        (torch.zeros(1, 8, 2056), 4, "D must be at most 2048 and K 256, got 2056 and 4"),
        (torch.zeros(1, 8, 64), 257, "D must be at most 2048 and K 256, got 64 and 257"),
        (torch.zeros(1, 64, 8).transpose(1, 2), 4, "keys must be contiguous, as `keys.contiguous()` is"),
        (torch.zeros(1, 8, 64).double(), 4, "it computes in float32, not in float64"),
    ],
)
def test_what_the_triton_search_does_not_take_is_a_reason(keys: torch.Tensor, k: int, reason: str) -> None:
    assert backends._unfit_for_triton_search(SEARCH[0], keys, *SEARCH[2:], 8, k) == reason


def test_a_cpu_without_the_extension_says_so_once_with_the_command_that_mends_it(nothing_compiled: None) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"which is slow, because .* \(the cpu module is not built\); `.*` builds it"
    ):
        resolve("knn_search", "auto", *SEARCH, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("knn_search", "auto", *SEARCH, 8, 4)
        resolve("knn_add_", "auto", SEARCH[1])


def test_what_was_asked_for_and_what_has_no_faster_version_is_no_warning(nothing_compiled: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("knn_search", "reference", *SEARCH, 8, 4)
        resolve("cosine", "auto", SEARCH[0])


@pytest.mark.usefixtures("_forgotten")
def test_float64_on_a_cpu_with_the_extension_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda module="cpu": (True, "loaded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("knn_search", "auto", SEARCH[0].double(), SEARCH[1].double(), *SEARCH[2:], 8, 4)


@pytest.mark.parametrize(
    ("change", "k", "reason"),
    [
        ({1: torch.zeros(1, 8, 64)}, 4, "keys must be float16 or bfloat16, got torch.float32"),
        ({1: torch.zeros(1, 8, 48, dtype=torch.float16)}, 4, r"D must be one of (32, 64, 96, 128, 256), got 48"),
        ({}, 129, "k must be at most 128, got 129"),
        ({1: torch.zeros(1, 64, 8, dtype=torch.float16).transpose(1, 2)}, 4, UNALIGNED),
        ({1: torch.zeros(1 + 8 * 64, dtype=torch.float16)[1:].view(1, 8, 64)}, 4, UNALIGNED),
    ],
)
def test_what_the_hopper_search_does_not_take_is_a_reason(change: dict, k: int, reason: str) -> None:
    arguments = [change.get(place, tensor) for place, tensor in enumerate(SEARCH)]
    assert backends._unfit_for_hopper(*arguments, 8, k) == reason


def test_every_implementation_can_be_loaded_or_says_why_not() -> None:
    for operator, candidates in backends.IMPLEMENTATIONS.items():
        for candidate in candidates:
            assert isinstance(candidate, Implementation)
            if candidate.why_not() is None:
                assert callable(candidate.load()), f"{operator} by {candidate.backend}"


def test_info_has_a_line_for_each_and_names_the_limits() -> None:
    lines = backends_info()
    assert len(lines) == sum(len(candidates) for candidates in backends.IMPLEMENTATIONS.values())
    assert all(line.live or line.reason for line in lines)
    assert {"reference"} == {line.backend for line in lines if line.operator == "cosine" and line.live} - {"triton"}


@pytest.mark.parametrize(("operator", "of_backward"), [("memory_attention", 0), ("memory_attention_backward", 4)])
def test_attention_kernels_leave_what_no_tile_holds_to_the_reference(operator: str, of_backward: int) -> None:
    kernel = backends.IMPLEMENTATIONS[operator][0]
    assert (kernel.backend, kernel.device) == ("triton", "cuda")

    def unfit(width: int, neighbours: int, dtype: torch.dtype) -> str | None:
        query, slots = torch.zeros(1, 1, 1, width, dtype=dtype), torch.zeros(1, 1, 1, neighbours, dtype=torch.int32)
        inputs = AttentionInputs(query, query, query, query[0], query[0], slots, query, slots, query)
        return kernel.unfit(inputs, *[query] * of_backward)

    assert unfit(128, 128, torch.float16) is None
    assert unfit(257, 32, torch.float16) == "D, E and K must be at most 256, got 257, 257 and 32"
    assert unfit(64, 300, torch.float16) == "D, E and K must be at most 256, got 64, 64 and 300"
    assert unfit(64, 32, torch.float64) == "it computes in float32, not in float64"
