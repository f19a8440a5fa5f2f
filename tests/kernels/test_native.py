"""The compiled operators, and how the package behaves when they are broken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from helpers.devices import threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrans_kernels import native

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _extension() -> None:
    live, reason = native.status()
    assert live, f"the extension must be built for these tests: {reason}"


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def stored(entries: Tensor, dtype: torch.dtype, keep_infinity: bool) -> Tensor:
    """What a ring of `dtype` holds of `entries`: nearest numbers, the largest one instead of an overflow."""
    limit = torch.finfo(dtype).max
    exact = entries.double()
    bounded = torch.where(exact.isinf() & keep_infinity, exact, exact.clamp(-limit, limit))
    return bounded if dtype == torch.float64 else bounded.float().to(dtype)


class RingModel:
    """The meaning of the ring write in plain Python: a row is a deque of the newest (entry, key, value)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys.clone(), values.clone()
        self.rows = [deque(maxlen=keys.shape[1]) for _ in range(keys.shape[0])]
        self.cursor = [0] * keys.shape[0]

    def add(self, rows: list[int], keys: Tensor, values: Tensor, count: list[int], at: list[int]) -> None:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        for index, row in enumerate(rows):
            for position in range(count[index]):
                entry = at[row] + position
                if entry >= self.cursor[row]:
                    self.rows[row].append((entry, keys[index, position], values[index, position]))
                    self.cursor[row] = entry + 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.keys.clone(), self.values.clone()
        for row, entries in enumerate(self.rows):
            for entry, key, value in entries:
                slot = entry % keys.shape[1]
                keys[row, slot] = stored(key, keys.dtype, keep_infinity=True)
                values[row, slot] = stored(value, values.dtype, keep_infinity=False)
        return keys, values, torch.tensor(self.cursor)


def entries_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random entries of all magnitudes, some of them beyond every narrower dtype, infinite or NaN."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-40, 40, shape, generator=generator)
    entries = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 3.4e38, 1e39, INF, -INF, NAN], dtype=torch.float64)
    chosen = special[torch.randint(0, len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, entries).to(dtype)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_ring_write_equals_a_deque_of_the_newest_entries(data: st.DataObject) -> None:
    ring_rows, slots, width = (data.draw(st.integers(1, top), name) for top, name in ((6, "R"), (5, "M + S"), (3, "D")))
    dtype = st.sampled_from(DTYPES)
    keys = entries_of((ring_rows, slots, width), data.draw(dtype, "keys"), seed=1)
    values = entries_of((ring_rows, slots, width), data.draw(dtype, "values"), seed=2)
    cursor = torch.zeros(ring_rows, dtype=torch.int64)
    model = RingModel(keys, values)
    for step in range(data.draw(st.integers(1, 4), "steps")):
        rows = data.draw(st.permutations(range(ring_rows)), "rows")[: data.draw(st.integers(1, ring_rows), "B * G")]
        groups = data.draw(st.sampled_from([g for g in range(1, len(rows) + 1) if len(rows) % g == 0]), "G")
        tokens = data.draw(st.integers(0, 2 * slots + 1), "N")
        shape = (len(rows) // groups, groups, tokens, width)
        new_keys = entries_of(shape, data.draw(dtype, "new_keys"), seed=10 + step)
        new_values = entries_of(shape, data.draw(dtype, "new_values"), seed=20 + step)
        count = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=len(rows), max_size=len(rows)), "count")
        behind = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=ring_rows, max_size=ring_rows), "behind")
        at = None if behind is None else [max(0, end - lag) for end, lag in zip(model.cursor, behind, strict=True)]

        native.knn_add_(
            keys,
            values,
            cursor,
            torch.tensor(rows),
            new_keys,
            new_values,
            None if count is None else torch.tensor(count, dtype=torch.int64),
            None if at is None else torch.tensor(at),
        )
        model.add(rows, new_keys, new_values, count or [tokens] * len(rows), at or list(model.cursor))
        for actual, expected in zip((keys, values, cursor), model.tensors(), strict=True):
            equal(actual, expected)


def ring(rows: int = 3, slots: int = 4, width: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(rows, slots, width), torch.zeros(rows, slots, width), torch.zeros(rows, dtype=torch.int64)


def test_long_segments_are_written_by_several_threads() -> None:
    keys, values, cursor = ring(rows=4, slots=700, width=64)
    new_keys, new_values = torch.randn(2, 2, 1000, 64), torch.randn(2, 2, 1000, 64)
    rows = torch.tensor([3, 0, 2, 1])
    with threads(2):
        native.knn_add_(keys, values, cursor, rows, new_keys, new_values)
    slot = torch.arange(300, 1000) % 700
    equal(keys[rows][:, slot], new_keys.flatten(0, 1)[:, 300:])
    equal(values[rows][:, slot], new_values.flatten(0, 1)[:, 300:])
    equal(cursor, torch.full((4,), 1000))


def test_views_are_read_and_written_in_place() -> None:
    storage = torch.zeros(3, 2, 4, 2)
    keys, values = storage.unbind(1)
    key_values = torch.randn(2, 3, 2, 2)  # (B, N, 2, D), as a model hands it over
    new_keys, new_values = key_values[:, None].unbind(-2)
    transposed = torch.randn(2, 1, 2, 3).transpose(2, 3)
    cursor = torch.zeros(6, dtype=torch.int64)[::2]
    rows = torch.tensor([2, 9, 0, 9])[::2]
    native.knn_add_(keys, values, cursor, rows, new_keys, new_values)
    equal(storage[2, :, :3], key_values[0].transpose(0, 1))
    equal(storage[0, :, :3], key_values[1].transpose(0, 1))
    native.knn_add_(keys, values, cursor, rows, transposed, transposed)
    equal(keys[[2, 0]][:, [3, 0, 1]], transposed[:, 0])
    equal(cursor, torch.tensor([6, 0, 6]))


def test_writing_a_segment_again_from_its_snapshot_changes_nothing() -> None:
    keys, values, cursor = ring()
    snapshot, rows = cursor.clone(), torch.tensor([0, 2])
    first, second = torch.randn(2, 1, 3, 2), torch.randn(2, 1, 3, 2)
    native.knn_add_(keys, values, cursor, rows, first, first, at=snapshot)
    before = keys.clone(), values.clone(), cursor.clone()
    native.knn_add_(keys, values, cursor, rows, second, second, at=snapshot)
    for actual, expected in zip((keys, values, cursor), before, strict=True):
        equal(actual, expected)


@pytest.mark.parametrize(("ring_dtype", "limit"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3895313892515355e38)])
def test_numbers_beyond_the_ring_saturate(ring_dtype: torch.dtype, limit: float) -> None:
    keys, values = torch.zeros(1, 1, 5, dtype=ring_dtype), torch.zeros(1, 1, 5, dtype=ring_dtype)
    entry = torch.tensor([3.4e38, -3.4e38, INF, -INF, NAN]).reshape(1, 1, 1, 5)
    native.knn_add_(keys, values, torch.zeros(1, dtype=torch.int64), torch.tensor([0]), entry, entry)
    equal(keys.double().flatten(), torch.tensor([limit, -limit, INF, -INF, NAN], dtype=torch.float64))
    equal(values.double().flatten(), torch.tensor([limit, -limit, limit, -limit, NAN], dtype=torch.float64))


NEW = torch.ones(2, 1, 3, 2)
BAD_INPUTS = {
    "rows must lie in 0..2, got 3": {"rows": torch.tensor([0, 3])},
    "rows must lie in 0..2, got -1": {"rows": torch.tensor([-1, 0])},
    "rows must be distinct, got 1 twice": {"rows": torch.tensor([1, 1])},
    "rows must be int64": {"rows": torch.tensor([0, 1], dtype=torch.int32)},
    "count must lie in 0..3, got 4": {"count": torch.tensor([1, 4])},
    "count must have shape (B * G,) = (2), got (3)": {"count": torch.tensor([1, 1, 1])},
    "at must not be negative, got -1": {"at": torch.tensor([0, -1, 0])},
    "at must have shape (R,) = (3), got (2)": {"at": torch.tensor([0, 0])},
    "values must have shape (R, M + S, E) = (3, 4, 2), got (3, 5, 2)": {"values": torch.zeros(3, 5, 2)},
    "new_keys must have shape (B, G, N, D) with B * G = 2": {"new_keys": torch.ones(2, 2, 3, 2)},
    "new_values must have shape (B, G, N, E) = (2, 1, 3, 2)": {"new_values": torch.ones(2, 1, 2, 2)},
    "new_values must be float32, float16, bfloat16 or float64": {
        "new_values": torch.ones(2, 1, 3, 2, dtype=torch.int32)
    },
    "keys must have at least one slot": {"keys": torch.zeros(3, 0, 2), "values": torch.zeros(3, 0, 2)},
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_names_the_argument_and_writes_nothing(message: str) -> None:
    keys, values, cursor = ring()
    arguments = {"keys": keys, "values": values, "cursor": cursor, "rows": torch.tensor([0, 1])}
    arguments |= {"new_keys": NEW, "new_values": NEW} | BAD_INPUTS[message]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native.knn_add_(**arguments)
    assert not arguments["keys"].any()
    assert not arguments["values"].any()
    assert not arguments["cursor"].any()


def test_operators_pass_opcheck() -> None:
    keys, values, cursor = ring()
    operator = torch.ops.memtrans.native_knn_add_.default
    torch.library.opcheck(operator, (keys, values, cursor, torch.tensor([0, 1]), NEW, NEW), test_utils="test_schema")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the loader looks for libraries instead of its own."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


def test_a_missing_library_says_that_it_was_never_built(elsewhere: Path) -> None:
    assert native.load() is False
    assert "never built" in native.status()[1]


def test_sources_that_hide_an_installed_package_say_so(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone is the working directory, and what `pip install .` built lies behind it on Python's path."""
    installed = elsewhere / "site-packages"
    (installed / "memtrans_kernels").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(elsewhere), str(installed)])
    assert native.hidden_package() is None
    (installed / "memtrans_kernels" / "_native_cpu.abi3.so").touch()
    assert native.hidden_package() == installed / "memtrans_kernels"
    native._open.cache_clear()
    reason = f"never built in {elsewhere}, which hides {installed / 'memtrans_kernels'}, where it was: run from another"
    assert reason in native.status()[1]
    (elsewhere / "_native_cpu.abi3.so").touch()
    assert native.hidden_package() is None


def test_the_reason_left_by_the_build_is_passed_on(elsewhere: Path) -> None:
    (elsewhere / "_native_cpu.txt").write_text("no compiler\n")
    assert native.status() == (False, "no compiler")


def test_a_corrupt_library_gives_a_reason(elsewhere: Path) -> None:
    (elsewhere / "_native_cpu.abi3.so").write_bytes(b"not a library")
    live, reason = native.status()
    assert not live
    assert re.search(r"_native_cpu\.abi3\.so cannot be loaded with torch .*: .+", reason)


def test_a_library_of_another_abi_gives_a_reason(elsewhere: Path) -> None:
    source = elsewhere / "other.c"
    source.write_text("int symbol_of_another_abi(void); int call(void) { return symbol_of_another_abi(); }\n")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "these tests need a compiler"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", elsewhere / "_native_cpu.abi3.so"], check=True)
    live, reason = native.status()
    assert not live
    assert "symbol_of_another_abi" in reason


def test_a_library_of_another_version_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = next(library for library in torch.ops.loaded_libraries if "_native_cpu" in library)
    (elsewhere / Path(built).name).symlink_to(built)
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    live, reason = native.status()
    assert not live
    assert f"built for interface {native.INTERFACE - 1}" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="its CUDA module may be loaded, and has the operator already")
def test_a_cuda_module_of_another_version_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = next(library for library in torch.ops.loaded_libraries if "_native_cpu" in library)
    (elsewhere / Path(built).name).symlink_to(built)
    (elsewhere / "_native_cuda.abi3.so").write_bytes(b"stands for one whose operator says another number")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with torch.library._scoped_library("memtrans", "IMPL") as library:
        library.impl("native_cuda_interface", lambda: native.INTERFACE - 1, "CompositeExplicitAutograd")
        live, reason = native.status("cuda")
    assert not live
    assert f"_native_cuda.abi3.so was built for interface {native.INTERFACE - 1}" in reason


def test_the_cuda_module_needs_the_schemas_of_the_cpu_module(elsewhere: Path) -> None:
    (elsewhere / "_native_cuda.abi3.so").write_bytes(b"not a library")
    live, reason = native.status("cuda")
    assert not live
    assert "cpu module" in reason


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(ValueError, match="module must be one of cpu, cuda, faiss, got 'gpu'"):
        native.status("gpu")


def test_a_library_that_the_last_build_did_not_replace_is_in_use_and_says_so(elsewhere: Path) -> None:
    built = next(library for library in torch.ops.loaded_libraries if "_native_cpu" in library)
    (elsewhere / "_native_cpu.abi3.so").symlink_to(built)
    (elsewhere / "_native_cpu.txt").write_text("no C++ compiler was found\n")
    older = "which an earlier build left; the last one did not: no C++ compiler was found"
    assert native.status() == (True, f"loaded from _native_cpu.abi3.so, {older}")


def test_a_verdict_says_whether_a_module_was_built_and_whether_it_is_live(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "_native_cuda.txt").write_text("no nvcc was found\n")
    (elsewhere / "_native_cpu.abi3.so").write_bytes(b"not a library")
    assert native.verdict("cpu").startswith("built, not loaded: _native_cpu.abi3.so cannot be loaded")
    assert native.verdict("cuda") == "not built: no nvcc was found"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    native._open.cache_clear()
    (elsewhere / "_native_cuda.abi3.so").write_bytes(b"not a library")
    assert native.verdict("cuda") == "built, no GPU here"
    monkeypatch.setattr(native, "status", lambda module: (True, "loaded"))
    assert native.verdict("cpu") == "built, loaded"
