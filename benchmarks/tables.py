"""Writes the tables of README.md and docs/ from the result files: `python benchmarks/tables.py` after new results.

A table stands between `<!-- table: MACHINE OP -->` and `<!-- end of table -->`. Each cell is the median in
milliseconds; behind it, in brackets, how many times as long as `memtrans` takes in the same case and mode. Where the
machine's ceilings were measured (bench_knn_search.py), `of the ceiling` is how near `memtrans` comes to the rate of a
large matrix product or of a copy, whichever it is nearer to. A third word asks for another table of the file:

- `peak`: the most memory that was allocated, that of the ring aside, in megabytes, and how many times what inputs and
  outputs take · `rate`: TFLOP/s of `memtrans`, and its share of the device's peak · `tokens`: tokens a second of
  training · `against`: today's times beside another commit's (against.py)
- `hard`: searches of keys that are not random, beside those of random ones; `triton`: these in Triton
- `gain`: held-out bits per byte of memory_gain.py's runs · `start`, `run`: runs of the command line · `text`: those of
  runs/*.sh whose names begin with the second word · `rows`: those of runs/paper.sh so, beside the paper's table 4
- `measured`, `held`, `scaled`: several GPUs (scaling.py)
- `compiled`, `roofline`: what compilers say of GPUs that are not here, and what is calculated (portability.py)
- `figures`: the README's five, each from a file of its own
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import portability
import scaling

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table: (\S+) (\S+)(?: (\w+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)
OURS = "memtrans"
OTHER_TRAINERS = ("memtrans-eager", "memtrans-launched", "upstream")
Entries = list[dict[str, Any]]


def results(machine: str, op: str) -> Any:
    """What a result file holds."""
    return json.loads((RESULTS / machine / f"{op}.json").read_text())


def lines_of(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    heads = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*heads, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def versions(entry: dict[str, Any], unit: str = "") -> str:
    """The line below a table: unit, machine and versions."""
    where = entry["gpu"].replace("none, ", "a CPU, ").replace(" 1 threads", " 1 thread")
    return f"\n{unit}{' on' if unit else 'On'} {where}, torch {entry['torch']}, triton {entry['triton']}.\n"


def milliseconds(value: float) -> str:
    """Three significant digits or all before the point, without an exponent.

    >>> [milliseconds(value) for value in (0.00712, 1.3541, 43.21, 512.3, 999.7)]
    ['0.00712', '1.35', '43.2', '512', '1,000']
    """
    if value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value >= 0.001 else f"{value:.6f}"


def cell(entry: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """An entry's time, and its ratio to ours."""
    if entry is None:
        return "–"
    if ours is None or entry is ours:
        return milliseconds(entry["ms"])
    return f"{milliseconds(entry['ms'])} ({entry['ms'] / ours['ms']:.1f}×)"


def peak_cell(entry: dict[str, Any] | None) -> str:
    """An entry's peak, and its ratio to inputs and outputs; the ring counts in neither."""
    if entry is None:
        return "–"
    peak, least = entry["peak_bytes"] - entry["ring_bytes"], entry["input_bytes"] + entry["output_bytes"]
    return f"{peak / 1e6:.0f} ({peak / (least - entry['ring_bytes']):.2f}×)"


def share_cell(entry: dict[str, Any] | None, ceilings: dict[str, float]) -> str:
    """How near an entry comes to the nearer one of the machine's ceilings."""
    shares = [entry[rate] / most for rate, most in ceilings.items() if rate in entry] if entry else []
    return f"{max(shares):.0%}" if shares else "–"


def ceilings_of(machine: str) -> dict[str, float]:
    """The best rates measured on a machine: `flop_per_second` and `bytes_per_second`."""
    entries = results(machine, "ceilings") if (RESULTS / machine / "ceilings.json").exists() else []
    return {rate: entry[rate] for entry in entries for rate in entry if rate.endswith("_per_second")}


def rate_cells(entry: dict[str, Any] | None) -> list[str]:
    """An entry's TFLOP/s, and the share of the device's peak."""
    if entry is None or "flop_per_second" not in entry:
        return ["–", "–"]
    return [f"{entry['flop_per_second'] / 1e12:#.3g}".rstrip("."), _of_peak(entry)]


def table(entries: Entries, ceilings: dict[str, float], peak: bool = False, rate: bool = False) -> str:
    """One row for each case, mode and dtype; one column for each implementation, ours first."""
    entries = [e for e in entries if "@" not in e["impl"] and not e["case"].startswith("hard-")]
    impls = sorted({entry["impl"] for entry in entries}, key=lambda impl: (impl != OURS, impl))
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    first_dtype: dict[tuple[str, str], str] = {}
    for entry in entries:
        case, mode, dtype = entry["case"], entry["mode"], entry["dtype"]
        if dtype != first_dtype.setdefault((case, mode), dtype):
            case = f"{case}, {dtype}"
        rows.setdefault((case, mode), {})[entry["impl"]] = entry
    ceilings = {rate: most for rate, most in ceilings.items() if any(rate in entry for entry in entries)}
    lines = []
    for labels, found in rows.items():
        cells = [peak_cell(found.get(impl)) if peak else cell(found.get(impl), found.get(OURS)) for impl in impls]
        cells += [share_cell(found.get(OURS), ceilings)] if ceilings else []
        lines.append([*labels, *cells, *(rate_cells(found.get(OURS)) if rate else [])])
    columns = ["case", "mode", *impls, *(["of the ceiling"] if ceilings else [])]
    columns += ["TFLOP/s", "of peak FLOP/s"] if rate else []
    return lines_of(columns, lines) + versions(entries[0], "Megabytes" if peak else "Milliseconds")


def hard_table(entries: Entries, impl: str = OURS) -> str:
    """Searches of keys that are not random: a kind of keys a row, with its ratio to random keys of the same shape."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        hard, _, rest = entry["case"].partition("-")
        if hard == "hard" and entry["impl"] == impl:
            place = re.search(r"(decode-)?(d64|d128|paper)-\w+$", rest)
            assert place is not None, entry["case"]
            found.setdefault(rest[: place.start() - 1], {})[place[0]] = entry
    random = found.pop("random")
    lines = [["random", *(milliseconds(entry["ms"]) for entry in random.values())]]
    lines += [[kind, *(cell(of.get(shape), random[shape]) for shape in random)] for kind, of in found.items()]
    return lines_of(["keys", *random], lines) + versions(next(iter(random.values())), "Milliseconds")


def against_table(entries: Entries) -> str:
    """Each implementation beside the same of another commit: medians, and the ratio with its range over the rounds."""
    found = {(entry["case"], entry["mode"], entry["impl"]): entry for entry in entries}
    rows = []
    for (case, mode, impl), before in found.items():
        if "@" not in impl:
            continue
        now = found[case, mode, impl.partition("@")[0]]
        ratios = [new / old for new, old in zip(now["rounds_ms"], before["rounds_ms"], strict=False)]
        ratio = f"{now['ms'] / before['ms']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([case, mode, impl, milliseconds(before["ms"]), milliseconds(now["ms"]), ratio, now["commit"]])
    columns = ["case", "mode", "before", "ms", "ms now", "now / before (in single rounds)", "now is"]
    return lines_of(columns, rows) + versions(entries[0], "Milliseconds")


def without_memory(case: str) -> str:
    """The training case of the same model that has no memory; of every text it is timed on sources in C.

    >>> without_memory("enwik8-64k"), without_memory("code-64k-hexdump")
    ('enwik8-off', 'code-off-c')
    """
    shape, *rest = case.split("-")
    return f"{shape}-off" + "-c" * (len(rest) > 1)


def tokens_table(entries: Entries) -> str:
    """Tokens a second of each case; ours also relative to the same shape without a memory, and to the device's peak."""
    measured = any("peak_share" in entry for entry in entries)
    found = {(entry["case"], entry["impl"]): entry for entry in entries}
    rows = []
    for case in dict.fromkeys(entry["case"] for entry in entries):
        ours, off = found[case, OURS], found[without_memory(case), OURS]
        others = [found.get((case, impl)) for impl in OTHER_TRAINERS]
        share = ours["tokens_per_second"] / off["tokens_per_second"]
        rates = [f"{other['tokens_per_second']:,.0f}" if other else "–" for other in others]
        own = [f"{ours['tokens_per_second']:,.0f}", f"{share:.1%}", *([_of_peak(ours)] if measured else [])]
        own += [f"{ours['gpu_busy']:.1%}"]
        rows.append([case, *own, f"{ours['peak_bytes'] / 1e9:.2f}", *rates])
    columns = ["case", "memtrans", "of memory off", *(["of peak FLOP/s"] if measured else [])]
    columns += ["GPU busy", "peak, GB", *OTHER_TRAINERS]
    return lines_of(columns, rows) + versions(entries[0], "Tokens a second")


def _of_peak(entry: dict[str, Any]) -> str:
    return f"{entry['peak_share']:.1%}" if "peak_share" in entry else "–"


def gain_table(entries: Entries) -> str:
    """Held-out bits per byte of each run: all, with retrieval off, and far into long documents."""
    far = max((int(place) for place in set.intersection(*(set(entry["by_position"]) for entry in entries))), default=0)
    sort = ("learning_rate", "xl", "memory", "seed")
    rows = []
    for entry in sorted(entries, key=lambda entry: [_start(entry), *(entry["settings"][name] for name in sort)]):
        settings, last = entry["settings"], entry["curve"][-1]
        cache, memory = (f"{settings[name]:,}" if settings[name] else "–" for name in ("xl", "memory"))
        off = f"{entry['bits_per_byte_without_memory']:.4f}" if settings["memory"] else "–"
        bits = [f"{entry['bits_per_byte']:.4f}", off, f"{entry['by_position'][str(far)]:.4f}"]
        run = [f"{last['bytes'] / 1e6:.0f} M", f"{last['seconds']:.0f}"]
        rows.append(
            [_start(entry), f"{settings['learning_rate']:g}", cache, memory, str(settings["seed"]), *bits, *run]
        )
    columns = ["local heads start", "learning rate", "XL cache", "memory", "seed", "bits per byte"]
    columns += ["with retrieval off", f"from byte {far:,} on", "training bytes", "seconds"]
    return lines_of(columns, rows) + versions(entries[0])


def _start(entry: dict[str, Any]) -> str:
    """How local heads started: at looking a few tokens back, or at random."""
    return "near" if entry["settings"]["position_start"] else "random"


def start_table(runs: Entries) -> str:
    """Runs of the demo's model that differ in how local heads start."""
    rows = [[run["start"], f"{run['memory']:,}", str(run["result"]["seed"]), *_bits(run["result"])] for run in runs]
    return lines_of(["start of the position bias", "memory", "seed", *BITS], rows)


BITS = ["bits per byte", "with retrieval off"]
PAPERS_GITHUB = {"512-0-512": "2.26", "512-8192-512": "2.03", "512-65536-512": "1.87"}  # table 4, after 500,000 steps


def _bits(result: dict[str, Any]) -> list[str]:
    return [f"{result[name]:.3f}" for name in ("eval_bits_per_byte", "eval_bits_per_byte_without_memory")]


def run_table(run: dict[str, Any]) -> str:
    """One run of the command line."""
    result = run["result"]
    row = [f"{result['parameters'] / 1e6:.2f} M", f"{result['steps']:,}", *_bits(result)]
    row += [f"{result['tokens_per_second']:,.0f}", f"{result['seconds']:.0f}"]
    return lines_of(["parameters", "steps", *BITS, "tokens a second", "seconds"], [row])


def of_script(machine: str, script: str) -> dict[str, Any]:
    """The runs of a script of runs/ by what their names say behind the script's."""
    runs = {path.stem.removeprefix(f"{script}-"): json.loads(path.read_text())
            for path in sorted((RESULTS / machine / "text").glob(f"{script}-*.json"))}  # fmt: skip
    assert runs, f"no result of {script} in {machine}/text"
    return runs


def text_table(machine: str, script: str) -> str:
    """The runs of a script of runs/, a row each: held-out bits per byte, with retrieval off, and far into documents."""
    runs = of_script(machine, script)
    places = [{int(place) for place in run["result"]["eval_by_position"]} for run in runs.values()]
    far = max(set.intersection(*places))
    until = "on" if all(far == max(of) for of in places) else f"to {2 * far:,}"
    rows = []
    for name, run in runs.items():
        result = run["result"]
        bits = [result["eval_bits_per_byte"], result["eval_bits_per_byte_without_memory"]]
        bits.append(result["eval_by_position"][str(far)])
        at_once = run.get("runs_at_once", 1)
        seconds = f"{run['seconds']:.0f}" + (f" ({at_once} at once)" if at_once > 1 else "")
        rows.append([name, f"{result['steps']:,}", seconds, *(f"{number:.4f}" for number in bits)])
    return lines_of(["run", "steps", "seconds of steps", *BITS, f"from token {far:,} {until}"], rows)


def rows_table(machine: str, script: str) -> str:
    """The rows of the paper's table 4 that a script has trained, in the table's order, and what the paper has there."""
    runs = of_script(machine, script)
    rows = []
    for name in sorted(runs, key=lambda name: [int(size) for size in name.split("-")[1:]]):
        result = runs[name]["result"]
        sizes = [f"{int(size):,}" if int(size) else "–" for size in name.split("-")]
        perplexities = result["eval_perplexity"], result["eval_perplexity_without_memory"]
        measured = [f"{result['steps']:,}", *map("{:.2f}".format, perplexities), f"{result['eval_bits_per_byte']:.3f}"]
        rows.append([*sizes, *measured, PAPERS_GITHUB.get(name, "–")])
    columns = ["context", "memory", "XL cache", "steps", "perplexity of a token", "with retrieval off", BITS[0]]
    return lines_of([*columns, "the paper's GitHub row, its perplexity"], rows)


def figures_table(machine: str) -> str:
    """The README's: what is measured, ours, and what stands beside it."""
    search, attention, train, generation = (
        {(entry["case"], entry["mode"], entry["impl"]): entry for entry in results(machine, op)}
        for op in ("knn_search", "memory_attention", "train", "generate")
    )
    both, step = ("d64-64k", "forward+backward"), ("enwik8-7680", "step")
    rows = [
        [
            "exact search: 65,536 queries, 32 of 65,536 keys for each",
            *_times(search, ("d64-64k", "forward"), "faiss-gpu"),
        ],
        ["attention to neighbours and local context, with gradients", *_times(attention, both, "upstream-compiled")],
        [
            "training, upstream's enwik8 set-up, memory of 7,680",
            *_rates(train[(*step, OURS)], train[(*step, "upstream")]),
        ],
        ["one token of 16 documents, memory of 65,536", *_tokens(generation)],
        ["held-out C sources, memory of 65,536", *_gain(results(machine, "memory_gain"))],
    ]
    return lines_of(["on one GPU", "memtrans", "beside it"], rows) + versions(results(machine, "train")[0])


def _times(found: dict[Any, dict[str, Any]], labels: tuple[str, str], rival: str) -> list[str]:
    ours, theirs = found[(*labels, OURS)]["ms"], found[(*labels, rival)]["ms"]
    return [f"{milliseconds(ours)} ms", f"{rival}: {milliseconds(theirs)} ms ({theirs / ours:.1f}×)"]


def _rates(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    rates = [entry["tokens_per_second"] for entry in (ours, theirs)]
    return [f"{rates[0]:,.0f} tokens/s", f"upstream: {rates[1]:,.0f} tokens/s (1/{rates[0] / rates[1]:.0f})"]


def _tokens(found: dict[Any, dict[str, Any]]) -> list[str]:
    on, off = (found[f"enwik8-{memory}-b16", "forward", OURS]["ms"] for memory in ("64k", "off"))
    return [f"{milliseconds(on)} ms", f"without a memory: {milliseconds(off)} ms"]


def _gain(entries: Entries) -> list[str]:
    """The worst seed with the memory against the best run without one."""
    of = {size: [e for e in entries if e["settings"]["memory"] == size and e["settings"]["position_start"]
                 and e["settings"]["xl"]] for size in (0, 65536)}  # fmt: skip
    worst, best = max(e["bits_per_byte"] for e in of[65536]), min(e["bits_per_byte"] for e in of[0])
    return [f"{worst:.3f} bits per byte", f"without a memory: {best:.3f} bits per byte"]


def by_case(entries: Entries) -> dict[str, dict[str, Any]]:
    return {entry["case"]: entry for entry in entries}


KINDS: dict[str | None, Callable[[str, str], str]] = {
    None: lambda machine, op: table(results(machine, op), ceilings_of(machine)),
    "peak": lambda machine, op: table(results(machine, op), {}, peak=True),
    "rate": lambda machine, op: table(results(machine, op), {}, rate=True),
    "hard": lambda machine, op: hard_table(results(machine, op)),
    "triton": lambda machine, op: hard_table(results(machine, op), "memtrans-triton"),
    "tokens": lambda machine, op: tokens_table(results(machine, op)),
    "against": lambda machine, op: against_table(results(machine, op)),
    "gain": lambda machine, op: gain_table(results(machine, op)),
    "start": lambda machine, op: start_table(results(machine, op)),
    "run": lambda machine, op: run_table(results(machine, op)),
    "text": text_table,
    "rows": rows_table,
    "figures": lambda machine, op: figures_table(machine),
    "measured": lambda machine, op: scaling.measured_table(by_case(results(machine, op))),
    "held": lambda machine, op: scaling.memory_table(),
    "compiled": lambda machine, op: portability.compiled_table(results(machine, op)),
    "roofline": lambda machine, op: portability.roofline_table(),
    "scaled": lambda machine, op: scaling.throughput_table(by_case(results(machine, op))),
}


def filled(text: str) -> str:
    """The page with every table made anew."""
    return PLACE.sub(lambda place: f"{place[1]}{KINDS[place[4]](place[2], place[3])}{place[5]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
