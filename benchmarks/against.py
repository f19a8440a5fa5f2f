"""Today's packages against another commit's: the same benchmarks, in rounds that alternate between the two.

    make bench-against REF=48195b5 K=enwik8
    python benchmarks/against.py --other ../before --name memtrans@48195b5 -k "enwik8 and 64k" bench_train.py

The first form builds REF in a worktree below `.against/`, once for each commit; the second takes any folder that holds
`memtrans/` and `memtrans_kernels/`, and needs no git. A folder that lacks a compiled library which today's tree has is
refused; MEMTRANS_BENCH_LIBRARIES names a folder with libraries that were built for it elsewhere.

Both trees run today's benchmarks, each round in a process of its own. After every round the result files have, for
each case that both could run, today's entry and the other's, named `memtrans@48195b5`: those of the round with the
median time, with the times of all rounds as `rounds_ms`. So a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import KEY, RESULTS, put

HERE = Path(__file__).resolve().parent
TODAY = HERE.parent
TREES = TODAY / ".against"  # one for each commit; git ignores it
NO_TESTS = 5  # pytest's exit status when nothing was selected
Times = dict[tuple[str, ...], list[dict[str, Any]]]  # the entries of a case, one a round


class Tree(NamedTuple):
    """What is measured: a folder with both packages, what its entries are called and of which commit they are."""

    folder: Path
    name: str
    commit: str | None


def worktree(ref: str) -> Tree:
    """REF checked out and built below `.against/`."""
    commit = _git("rev-parse", "--verify", f"{ref}^{{commit}}")
    folder = TREES / commit[:12]
    if not folder.exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", str(folder), commit)
    if not (folder / ".built").exists():
        if not os.environ.get("MEMTRANS_BENCH_LIBRARIES"):
            subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, check=True)
        (folder / ".built").touch()
    return Tree(folder, f"memtrans@{commit[:7]}", commit[:12])


def _git(*command: str) -> str:
    done = subprocess.run(["git", "-C", str(TODAY), *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def require_libraries(tree: Path) -> None:
    """Exits unless the tree has every compiled library of today's, if need be from MEMTRANS_BENCH_LIBRARIES."""
    given = os.environ.get("MEMTRANS_BENCH_LIBRARIES")
    for library in sorted(Path(given).glob("_native_*.so")) if given else []:
        shutil.copy2(library, tree / "memtrans_kernels" / library.name)
    ours = {library.name for library in (TODAY / "memtrans_kernels").glob("_native_*.so")}
    missing = sorted(name for name in ours if not (tree / "memtrans_kernels" / name).exists())
    if missing:
        raise SystemExit(
            f"{tree} has no {', '.join(missing)}, which today's tree has: build it there, or name a folder that "
            "has it by MEMTRANS_BENCH_LIBRARIES"
        )


def run(tree: Tree, selection: list[str], results: Path) -> int:
    """One round of a tree, with pytest's exit status; its entries go to `results`, its output beside them."""
    results.mkdir(parents=True)
    variables = {
        "PYTHONPATH": str(tree.folder),
        "MEMTRANS_BENCH_TREE": str(tree.folder),
        "MEMTRANS_BENCH_OURS": "1",
        "MEMTRANS_BENCH_RESULTS": str(results),
        **({"MEMTRANS_COMMIT": tree.commit} if tree.commit else {}),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-c", str(TODAY / "pyproject.toml"), *selection]
    # pytest puts the working directory before PYTHONPATH, so that must be a folder without packages
    with (results / "output.txt").open("w") as output:
        done = subprocess.run(command, env={**os.environ, **variables}, cwd=results, stdout=output, stderr=output)
    return done.returncode


def entries_of(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The machine and each entry that a round wrote."""
    for path in sorted(results.glob("*/*.json")):
        for entry in json.loads(path.read_text()):
            yield path.parent.name, entry


def collect(times: Times, results: Path) -> None:
    for machine, entry in entries_of(results):
        times.setdefault((machine, *(entry[name] for name in KEY)), []).append(entry)


def middle(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of the round with the median time (of two in the middle the faster), and the times of all."""
    median = statistics.median_low(entry["ms"] for entry in entries)
    return {**next(e for e in entries if e["ms"] == median), "rounds_ms": [entry["ms"] for entry in entries]}


def write(today: Times, other: Times, name: str) -> list[str]:
    """Both medians into the result files; a line for each case."""
    lines = []
    for key in [key for key in today if key in other]:
        ours, theirs = middle(today[key]), middle(other[key])
        suffix = name.removeprefix("memtrans")
        for entry in (ours, {**theirs, "impl": theirs["impl"] + suffix}):
            put(RESULTS / key[0] / f"{entry['op']}.json", entry)
        ratios = [new["ms"] / old["ms"] for new, old in zip(today[key], other[key], strict=False)]
        lines.append(
            f"{' '.join(key[1:])}: {ours['ms']:.4g} ms, {name} {theirs['ms']:.4g} ms, "
            f"{ours['ms'] / theirs['ms']:.3f} times ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return lines


def compare(other: Tree, selection: list[str], rounds: int) -> None:
    """Alternates between the two, and writes the medians after every round. Exits where they have nothing in common."""
    trees = (Tree(TODAY, "memtrans", None), other)
    times: tuple[Times, Times] = ({}, {})
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for which in ((0, 1), (1, 0))[number % 2]:
                results = Path(scratch) / f"{number}-{which}"
                status = run(trees[which], selection, results)
                collect(times[which], results)
                if status == NO_TESTS:
                    raise SystemExit(f"no benchmark is selected by {' '.join(selection)}")
                if status and number == 0:  # later rounds would say the same
                    print(f"{trees[which].name}, exit status {status}:", file=sys.stderr)
                    print((results / "output.txt").read_text()[-6000:], file=sys.stderr)
            lines = write(*times, other.name)
            print(f"round {number + 1} of {rounds}", *lines, sep="\n", flush=True)
            if not lines:
                raise SystemExit(f"{other.name} and today's tree have no case in common")
    for key in sorted(set(times[0]) ^ set(times[1])):
        print(f"{' '.join(key[1:])}: measured in one tree only", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ref", help="a commit of this repository")
    source.add_argument("--other", type=Path, metavar="FOLDER", help="a tree that is there already")
    parser.add_argument("--name", help="what its entries are called: memtrans@ and the commit (needed with --other)")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="as bench_train.py (all)")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which benchmarks, as pytest's -k (all)")
    parser.add_argument("--rounds", type=int, default=5, help="of each tree (5)")
    options = parser.parse_args(arguments)
    if options.other and not (options.name or "").startswith("memtrans@"):
        parser.error(f"--name must begin with memtrans@, got {options.name!r}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.ref:
        tree = worktree(options.ref)
    else:
        tree = Tree(options.other.resolve(), options.name, options.name.partition("@")[2])
    require_libraries(tree.folder)
    modules = [str(HERE / module) for module in options.modules or [""]]
    compare(tree, [*modules, *(["-k", options.k] if options.k else [])], options.rounds)


if __name__ == "__main__":
    main()
