"""What everything is measured at, how it is timed, and how it is written down.

Sizes are in the letters of `memtrans_kernels`. There is one entry for each operator, implementation, case, mode and
dtype.

GPU time is the median of CUDA events around replays of a captured graph of calls, so that what the host needs to launch
them does not count; `eager_ms` is that of calls launched one by one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from other_tree import measure_tree
from torch import Tensor

if other := os.environ.get("MEMTRANS_BENCH_TREE"):
    measure_tree(Path(other))

MEMORIES = {"8k": 8192, "64k": 65536, "262k": 262144}
TOY = os.environ.get("MEMTRANS_BENCH_TOY") == "1"  # sizes for a test that only asks whether the benchmarks run

FOLDER = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("MEMTRANS_BENCH_RESULTS", FOLDER / "results"))
GRAPH_BELOW = 8.0  # ms; a call that takes longer keeps the GPU busy without a graph
SLOW = 50.0  # ms; of calls that take longer a few are enough
GRAPH_CALLS, ROUNDS, WARM_UP = 20, 50, 5
RATED = ("bytes", "flop", "tokens")
KEY = ("op", "impl", "case", "mode", "dtype")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    name: str
    width: int  # D
    groups: int  # G
    capacity: int  # M
    batch: int = 16  # B
    heads: int = 8  # H
    length: int = 512  # N
    neighbours: int = 32  # K
    spare: int = 512  # S

    @property
    def rows(self) -> int:
        return self.batch * self.groups


def case(name: str) -> Case:
    """`[decode-|cpu-|b1-]<d64|d128|d256|paper>-<8k|64k|262k>`, as tables and result files name it.

    `decode-` is one query a head; `b1-` one document; `cpu-` two documents and one head, for machines of two cores.

    >>> case("decode-paper-64k").length, case("cpu-d64-64k").batch
    (1, 2)
    """
    shape, memory = name.removeprefix("decode-").removeprefix("cpu-").removeprefix("b1-").rsplit("-", 1)
    width, groups = {"d64": (64, 1), "d128": (128, 1), "d256": (256, 1), "paper": (128, 8)}[shape]
    made = Case(name, width, groups, MEMORIES[memory], length=1 if name.startswith("decode-") else 512)
    if name.startswith("cpu-"):
        made = replace(made, batch=2, heads=1)
    if name.startswith("b1-"):
        made = replace(made, batch=1)
    small = {"batch": min(2, made.batch), "capacity": 32, "length": min(8, made.length), "neighbours": 4, "spare": 8}
    return replace(made, **small) if TOY else made


@dataclass
class Ring:
    """A memory that is full and has wrapped round: random keys of unit length, random values."""

    keys: Tensor  # (R, M + S, D)
    values: Tensor  # (R, M + S, D)
    cursor: Tensor  # (R,)
    start: Tensor  # (R,)
    rows: Tensor  # (B·G,)


def full_ring(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Ring:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.rows, case.capacity + case.spare, case.width)
    keys, values = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
    keys /= keys.norm(dim=-1, keepdim=True)
    cursor = torch.full((case.rows,), 2 * shape[1] + case.spare // 2, device=device)
    return Ring(keys, values, cursor, torch.zeros_like(cursor), torch.arange(case.rows, device=device))


def machine() -> str:
    """The folder of the results: `cpu`, or a GPU's short name and how many there are, as in `h200-x2`."""
    if DEVICE == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name().lower().split()
    name = next((word for word in words if word[:1] in "abhg" and word[1:].isdigit()), "-".join(words))
    return name if torch.cuda.device_count() == 1 else f"{name}-x{torch.cuda.device_count()}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gpu_milliseconds(function: Callable[[], Any], graph_below: float = GRAPH_BELOW) -> tuple[float, float]:
    """Median GPU time of one call in a replayed graph, and launched by itself, when the host's work may count too."""
    eager = _uncaptured(function)
    if eager >= graph_below:
        return eager, eager
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            function()
    rounds = ROUNDS if eager < 1.0 else ROUNDS // 5
    return _event_milliseconds(graph.replay, rounds) / GRAPH_CALLS, eager


def _event_milliseconds(function: Callable[[], Any], rounds: int) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def measure(
    benchmark: Any,
    function: Callable[[], Any],
    *,
    op: str,
    impl: str,
    case: str,
    dtype: torch.dtype,
    mode: str = "forward",
    capturable: bool = True,
    graph_below: float = GRAPH_BELOW,
    calls: int = 1,
    **extra: Any,
) -> None:
    """Times `function` and writes the entry down, with a rate a second for each of `bytes`, `flop` and `tokens`, and
    of `flop` the share of the device's peak.

    graph_below: ms; a call that takes longer is not captured. calls: of what is timed, in one call of `function`; the
        time and the rates are those of one of them.
    """
    labels = {"op": op, "impl": impl, "case": case, "mode": mode, "dtype": dtype_name(dtype)}
    benchmark.extra_info.update(labels, **environment(), **extra)
    if DEVICE == "cpu":
        benchmark.pedantic(function, rounds=2 if TOY else 15, warmup_rounds=3)
        milliseconds = benchmark.stats.stats.median * 1e3 / calls if benchmark.stats else None
    else:
        captured, eager = gpu_milliseconds(function, graph_below) if capturable else 2 * (_uncaptured(function),)
        milliseconds = captured / calls
        benchmark.extra_info.update(gpu_ms=milliseconds, eager_ms=eager / calls)
        benchmark.pedantic(lambda: (function(), torch.cuda.synchronize()), rounds=5)
    rates = {f"{name}_per_second": extra[name] / milliseconds * 1e3 for name in RATED if name in extra and milliseconds}
    rates |= share_of_peak(rates.get("flop_per_second"), dtype)
    write_down({**benchmark.extra_info, **rates, "ms": milliseconds})


def share_of_peak(flop_per_second: float | None, dtype: torch.dtype) -> dict[str, float]:
    """`peak_share` of an entry; nothing where it has no FLOP, or the device no known peak in that dtype."""
    if flop_per_second is None or DEVICE == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return {}
    try:
        from memtrans.training.peak import peak_rate
    except ImportError:  # of an older tree, which is measured beside this one
        return {}
    peak = peak_rate(torch.cuda.get_device_name())
    return {} if peak is None else {"peak_share": flop_per_second / peak}


def _uncaptured(function: Callable[[], Any]) -> float:
    """Of calls launched one by one; fewer of those that take long."""
    function()
    slow = _event_milliseconds(function, 1) >= SLOW
    for _ in range(1 if slow else WARM_UP):
        function()
    return _event_milliseconds(function, ROUNDS // 5 if slow else ROUNDS)


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """What they hold, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any], inputs: int) -> int:
    """Allocated at most while `run` runs, beside what was there already, and with its inputs; 0 on a CPU."""
    if DEVICE == "cpu":
        return 0
    run()  # compiles, and lets libraries have their workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + inputs


def busy_share(function: Callable[[], Any]) -> float | None:
    """The share of its time in which at least one kernel runs on the GPU.

    The kernels' time is the profiler's, the whole time is that of a call without it: a profiler holds the host up.
    """
    if DEVICE == "cpu":
        return None
    # else the profiler stays attached and everything later is slower (docs/log.md)
    os.environ["TEARDOWN_CUPTI"] = "1"
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy, reached = 0.0, 0.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in on_gpu):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / seconds


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As one graph of these sizes, or an error; at toy size what was traced runs as it is."""
    torch._dynamo.reset()  # a compiler that has seen too many sizes would run the function as it is
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager" if TOY else "inductor")


def write_down(entry: dict[str, Any]) -> Path:
    """Puts the entry into `results/<machine>/<op>.json`, in place of an earlier one of the same labels."""
    path = RESULTS / machine() / f"{entry['op']}.json"
    put(path, entry)
    return path


def put(path: Path, entry: dict[str, Any]) -> None:
    """Adds the entry to a result file, in place of an earlier one of the same labels."""
    entries = json.loads(path.read_text()) if path.exists() else []
    same = [number for number, other in enumerate(entries) if all(other[name] == entry[name] for name in KEY)]
    for number in reversed(same):
        del entries[number]
    entries.insert(same[0] if same else len(entries), entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")  # so that a run that is cut off leaves what it had
    whole.write_text(json.dumps(entries, indent=1) + "\n")
    whole.replace(path)


def environment() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else f"none, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """MEMTRANS_COMMIT, where a copy does not know it; else the checkout's, `-dirty` where more differs than results."""
    if given := os.environ.get("MEMTRANS_COMMIT"):
        return given
    git = ["git", "-C", str(FOLDER)]
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(changed, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if dirty else "")
