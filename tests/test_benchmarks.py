"""The benchmarks run, at toy size, and write down what the tables are made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.scripts import BENCHMARKS, benchmark_script
from helpers.separate import Ended, beside_each_other, selected
from helpers.tiny_runs import written_text

SLOW = "compiled or flex"  # the compiler takes its time
SEVERAL = "bench_multi_gpu.py"  # and so do processes that start
LABELS = {"op", "impl", "case", "mode", "dtype", "gpu", "torch", "triton", "commit"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, results: Path) -> Iterator[dict[str, Future[Ended]]]:
    """Of each module the process that it shares with all others, because PyTorch's start takes its time."""
    variables = {"MEMTRANS_BENCH_TOY": "1", "CUDA_VISIBLE_DEVICES": "", "MEMTRANS_BENCH_RESULTS": str(results)}
    chosen = selected(request)
    arguments = [*(str(BENCHMARKS / module) for module in chosen), "-k", f"not ({SLOW})"]
    for ends in beside_each_other(["all"], lambda _: (arguments, variables)):
        yield dict.fromkeys(chosen, ends["all"])


@pytest.mark.parametrize("module", sorted({path.name for path in BENCHMARKS.glob("bench_*.py")} - {SEVERAL}))
def test_a_benchmark_runs_and_writes_its_entries(module: str, runs: dict[str, Future[Ended]], results: Path) -> None:
    done = runs[module].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert_entries(results, module)


@pytest.mark.slow
def test_entries_that_compile_and_those_of_several_ranks_are_written_too(tmp_path: Path) -> None:
    variables = {"MEMTRANS_BENCH_TOY": "1", "CUDA_VISIBLE_DEVICES": "", "MEMTRANS_BENCH_RESULTS": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", *map(str, sorted(BENCHMARKS.glob("bench_*.py")))]
    command += ["-k", f"{SLOW} or multi_gpu"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert_entries(tmp_path, SEVERAL)
    impls = {entry["impl"] for entry in json.loads((tmp_path / "cpu" / "model.json").read_text())}
    assert "memtrans-compiled" in impls


def assert_entries(results: Path, module: str) -> None:
    operator = module.removeprefix("bench_").removesuffix(".py")
    entries = json.loads((results / "cpu" / f"{operator}.json").read_text())
    assert entries
    for entry in entries:
        assert set(entry) >= LABELS
        assert entry["ms"] > 0
    assert {entry["impl"] for entry in entries} >= {"memtrans"}


@pytest.mark.slow
def test_a_profile_of_a_step_names_what_took_longest_first() -> None:
    environment = {**os.environ, "MEMTRANS_BENCH_TOY": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "step_profile.py"), "code-off-c", "--eager", "--most", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, *lines = done.stdout.splitlines()
    assert first.startswith("code-off-c: ") and len(lines) == 5
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times, reverse=True) and times[0] > 0


def test_memory_gain_trains_each_size_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "MEMTRANS_BENCH_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, str(BENCHMARKS / "memory_gain.py"), "--data", written_text(tmp_path)]
    small = ["batch=2", "segment=32", "layers=2", "width=16", "heads=2", "head_width=8", "memory_layers=[1]", "xl=0"]
    sizes = ["--bytes", "800", "--memory", "0", "64", "--eval-bytes", "500", "--final-eval-bytes", "2000"]
    picture = tmp_path / "gain.png"
    command = [*script, *sizes, "--set", *small, 'dtype="float32"']
    subprocess.run(command, env=environment, cwd=BENCHMARKS.parent, check=True)
    memory_gain = benchmark_script("memory_gain")
    monkeypatch.setattr(memory_gain, "RESULTS", tmp_path)
    memory_gain.main(["--plot", str(picture), "--machine", "cpu"])
    off, on = json.loads((tmp_path / "cpu" / "memory_gain.json").read_text())
    assert (off["settings"]["memory"], on["settings"]["memory"]) == (0, 64)
    assert off["bits_per_byte"] == off["bits_per_byte_without_memory"]
    assert on["bits_per_byte"] != on["bits_per_byte_without_memory"]
    assert [point["bytes"] for point in on["curve"]] == sorted({point["bytes"] for point in on["curve"]})
    assert picture.stat().st_size > 0
    rows = benchmark_script("tables").gain_table([off, on]).splitlines()[2:4]
    assert [row.split(" | ")[3:5] for row in rows] == [["–", "0"], ["64", "0"]]
    assert f"{on['bits_per_byte']:.4f}" in rows[1] and f"{on['bits_per_byte_without_memory']:.4f}" in rows[1]


def run_of_a_script(folder: Path, name: str, at_once: int, places: dict[str, float]) -> None:
    bits = {"eval_bits_per_byte": 2.0, "eval_bits_per_byte_without_memory": 3.0, "eval_by_position": places}
    bits |= {"eval_perplexity": 4.0, "eval_perplexity_without_memory": 8.0}
    run = {"seconds": 4.6, "runs_at_once": at_once, "result": {"steps": 1000, **bits}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(run))


def test_a_table_of_a_script_has_its_runs_by_the_farthest_place_that_all_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, folder = benchmark_script("tables"), tmp_path / "h200" / "text"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    run_of_a_script(folder, "a-0", 1, {"0": 1.5, "512": 1.25})
    run_of_a_script(folder, "a-64", 2, {"0": 1.0, "512": 0.75, "1024": 0.5})
    head, _, *rows = tables.text_table("h200", "a").splitlines()
    assert head.endswith("| from token 512 to 1,024 |")
    assert rows == [
        "| 0 | 1,000 | 5 | 2.0000 | 3.0000 | 1.2500 |",
        "| 64 | 1,000 | 5 (2 at once) | 2.0000 | 3.0000 | 0.7500 |",
    ]
    run_of_a_script(folder, "b-0", 1, {"0": 1.5, "512": 1.25})
    assert tables.text_table("h200", "b").splitlines()[0].endswith("| from token 512 on |")
    with pytest.raises(AssertionError, match="no result of late in h200/text"):
        tables.text_table("h200", "late")


def test_rows_of_the_papers_table_stand_in_its_order_beside_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = benchmark_script("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("paper-512-65536-512", "paper-512-8192-512", "paper-512-0-0"):
        run_of_a_script(tmp_path / "h200" / "text", name, 1, {})
    assert tables.rows_table("h200", "paper").splitlines()[2:] == [
        "| 512 | – | – | 1,000 | 4.00 | 8.00 | 2.000 | – |",
        "| 512 | 8,192 | 512 | 1,000 | 4.00 | 8.00 | 2.000 | 2.03 |",
        "| 512 | 65,536 | 512 | 1,000 | 4.00 | 8.00 | 2.000 | 1.87 |",
    ]


@pytest.mark.slow
def test_a_late_memory_may_have_settings_of_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "MEMTRANS_BENCH_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, str(BENCHMARKS / "memory_gain.py"), "--data", written_text(tmp_path)]
    small = ["batch=2", "segment=32", "layers=2", "width=16", "heads=2", "head_width=8", "memory_layers=[1]", "xl=0"]
    sizes = ["--bytes", "800", "--memory", "64", "--eval-bytes", "500", "--final-eval-bytes", "2000"]
    then = ["--late", "0", "--late-share", "0.5", "--late-set", "memory_layers=[1,2]", "final_rate=0"]
    subprocess.run([*script, *sizes, *then, "--set", *small], env=environment, cwd=BENCHMARKS.parent, check=True)
    (entry,) = json.loads((tmp_path / "cpu" / "memory_gain.json").read_text())
    settings = entry["settings"]
    assert [settings[name] for name in ("memory_layers", "final_rate", "steps")] == [[1, 2], 0, 18]
    assert entry["bits_per_byte"] != entry["bits_per_byte_without_memory"]


@pytest.mark.parametrize(("name", "local"), [("cpu-d64-l512", 512), ("cpu-d64-l1024", 1024), ("cpu-d128-l512", 512)])
def test_local_attention_counts_products_of_what_is_seen_alone(name: str, local: int) -> None:
    given = benchmark_script("bench_local_attention").problem(name)
    seen = torch.ones(512, local).tril(local - 512)
    batch, heads, _, width = given.query.shape
    assert (given.key.shape[2], given.flop) == (local, 2 * batch * heads * width * int(seen.sum()))


def train_entry(case: str, **more: float) -> dict:
    versions = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0"}
    rates = {"tokens_per_second": 1e6, "gpu_busy": 1.0, "peak_bytes": 1e9}
    return {"case": case, "impl": "memtrans", **versions, **rates, **more}


def test_a_table_of_training_has_the_share_of_the_peak_where_an_entry_knows_it() -> None:
    tokens_table = benchmark_script("tables").tokens_table
    known = tokens_table([train_entry("enwik8-off", peak_share=0.2137), train_entry("enwik8-64k")]).splitlines()
    assert [row.split(" | ")[2:5] for row in (known[0], known[2], known[3])] == [
        ["of memory off", "of peak FLOP/s", "GPU busy"], ["100.0%", "21.4%", "100.0%"], ["100.0%", "–", "100.0%"],
    ]  # fmt: skip
    unknown = tokens_table([train_entry("enwik8-off")])
    assert "of peak" not in unknown


def test_a_table_of_rates_has_ours_and_its_share_of_the_peak() -> None:
    labels = {
        "mode": "forward",
        "dtype": "bfloat16",
        "gpu": "NVIDIA H100 80GB HBM3",
        "torch": "2.11.0",
        "triton": "3.6.0",
    }
    ours = {"impl": "memtrans", "ms": 0.059, "flop_per_second": 72.94e12, "peak_share": 0.0737}
    entries = [{**labels, **ours, "case": "d64-l512"}, {**labels, "impl": "sdpa", "case": "d64-l512", "ms": 0.02}]
    lines = benchmark_script("tables").table([*entries, {**entries[1], "case": "other"}], {}, rate=True).splitlines()
    assert [lines[0], *lines[2:4]] == [
        "| case | mode | memtrans | sdpa | TFLOP/s | of peak FLOP/s |",
        "| d64-l512 | forward | 0.0590 | 0.0200 (0.3×) | 72.9 | 7.4% |",
        "| other | forward | – | 0.0200 | – | – |",
    ]


def test_an_entry_of_training_has_the_share_that_its_trainer_knows() -> None:
    peak_share = benchmark_script("bench_train").peak_share
    known = SimpleNamespace(peak_share=lambda rate: rate / 1e6, flop_per_token=3.0)
    assert peak_share(known, 5e5) == {"flop_per_token": 3.0, "peak_share": 0.5}
    assert peak_share(SimpleNamespace(peak_share=lambda rate: None), 5e5) == {}
    assert peak_share(SimpleNamespace(), 5e5) == {}  # an older tree's


def test_an_entry_with_flop_has_the_share_of_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    common = benchmark_script("common")
    monkeypatch.setattr(common, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert common.share_of_peak(156e12, torch.bfloat16) == {"peak_share": 0.5}
    assert common.share_of_peak(None, torch.bfloat16) == common.share_of_peak(156e12, torch.float32) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert common.share_of_peak(156e12, torch.bfloat16) == {}
