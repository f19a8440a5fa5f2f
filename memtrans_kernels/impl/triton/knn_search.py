"""Exact top-K search in Triton, for every GPU that Triton compiles for.

    scores[b, h, n, :], slots[b, h, n, :] = the K best <query[b, h, n], key> over the visible slots of row rows[b·G + g]

    query (B, H, N, D) · keys (R, M + S, D) · rows (B·G,) · start, cursor (R,)
    -> scores float32, slots int32 (B, H, N, K)

Its work depends on the sizes alone, not on what the keys hold:

    shown     which entries are visible and finite, where many programs are going to ask
    maxima    all products, on the tensor cores; of each run of 8 or 16 entries only the largest is kept
    coarsen   and of FAN runs the largest again, until a program can hold all of a query's
    choose    the K best of the coarsest, then the K best of their children, down to runs
    score     the products of K runs once more, bit for bit the same
    best      the K best of these

Queries go in chunks, so that what is kept between the steps stays within WORKSPACE_BYTES. The host reads no number.

Source: Wu et al. 2022, section 3.1. Limits: keys float16, bfloat16 or float32, D up to 2048, K up to 256. Precision:
one float32 accumulation; float32 keys by three products of tensor-float-32 parts on NVIDIA GPUs, never by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.knn_search_maxima import knn_maxima_kernel, knn_shown_kernel
from memtrans_kernels.impl.triton.knn_search_score import knn_score_kernel
from memtrans_kernels.impl.triton.knn_search_select import knn_best_kernel, knn_choose_kernel, knn_coarsen_kernel
from memtrans_kernels.impl.triton.targets import target_of

WORKSPACE_BYTES = 512 << 20


class Level(NamedTuple):
    """Maxima of so many entries each, so many of them for one query."""

    run: int
    runs: int


class Problem(NamedTuple):
    """The tensors that every step reads, and the sizes that go with them."""

    query: Tensor  # (B, H, N, D), contiguous, in the keys' dtype
    keys: Tensor  # (R, M + S, D)
    window: tuple[Tensor, Tensor, Tensor]  # rows (B·G,), start (R,), cursor (R,)
    capacity: int
    k: int
    queries_of_row: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.keys.shape[1], self.capacity


class Chunk(NamedTuple):
    """Consecutive blocks of queries, and what they need between the steps."""

    first_block: int
    blocks: int
    first_query: int
    queries: int
    first_row: int
    rows: int


def knn_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    """One launch of each step for each chunk of queries."""
    scores = torch.empty((*query.shape[:3], k), dtype=torch.float32, device=query.device)
    slots = torch.empty(scores.shape, dtype=torch.int32, device=query.device)
    if scores.numel() == 0:
        return scores, slots
    queries_of_row = query[..., 0].numel() // rows.numel()
    launch = configs.search(target_of(keys.device), keys.element_size(), keys.shape[-1], capacity, k, queries_of_row)
    window = (rows.contiguous(), start.contiguous(), cursor.contiguous())
    problem = Problem(query.to(keys.dtype).contiguous(), keys, window, capacity, k, queries_of_row)
    levels = _levels(capacity, launch)
    for chunk in _chunks(problem, launch, levels):
        shown = _shown(problem, launch, chunk)
        runs = _choose(problem, launch, chunk, levels, _maxima(problem, launch, chunk, levels, shown))
        candidates = _score(problem, launch, chunk, shown, runs)
        _best(problem, launch, chunk, candidates, runs, scores, slots)
    return scores, slots


def _levels(capacity: int, launch: configs.SearchLaunch) -> list[Level]:
    """From runs to the coarsest; the second one, where it is needed, is of whole tiles."""
    tiles = configs.blocks_of(capacity, launch.keys)
    levels = [Level(launch.run, tiles * (launch.keys // launch.run))]
    fan = launch.keys // launch.run
    while levels[-1].runs > launch.held:
        levels.append(Level(levels[-1].run * fan, configs.blocks_of(levels[-1].runs, fan)))
        fan = configs.SEARCH_FAN
    return levels


def _chunks(problem: Problem, launch: configs.SearchLaunch, levels: list[Level]) -> list[Chunk]:
    of_row = problem.queries_of_row
    total = problem.query[..., 0].numel()
    blocks_of_row = configs.blocks_of(of_row, launch.queries)
    blocks = total // of_row * blocks_of_row
    row_bytes = configs.blocks_of(problem.capacity, launch.keys) * (launch.keys + 4)
    query_bytes = 4 * sum(level.runs for level in levels) + launch.neighbours * (4 * launch.run + 8)
    block_bytes = min(launch.queries, of_row) * query_bytes + configs.blocks_of(row_bytes, blocks_of_row)
    most = max(1, WORKSPACE_BYTES // block_bytes)
    chunks = []
    for first in range(0, blocks, most):
        last = min(first + most, blocks)
        begin, end = (_first_query(block, blocks_of_row, launch.queries, of_row) for block in (first, last))
        first_row, end_row = first // blocks_of_row, (last - 1) // blocks_of_row + 1
        chunks.append(Chunk(first, last - first, begin, end - begin, first_row, end_row - first_row))
    return chunks


def _first_query(block: int, blocks_of_row: int, queries: int, of_row: int) -> int:
    return block // blocks_of_row * of_row + block % blocks_of_row * queries


def _shown(problem: Problem, launch: configs.SearchLaunch, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """Which entries may be found; None where the programs that load them look for themselves."""
    if not launch.shown:
        return None
    tiles = configs.blocks_of(problem.capacity, launch.keys)
    shown = torch.empty((chunk.rows, tiles * launch.keys), dtype=torch.int8, device=problem.keys.device)
    whole = torch.empty((chunk.rows, tiles), dtype=torch.int32, device=problem.keys.device)
    knn_shown_kernel[(chunk.rows * tiles,)](
        problem.keys, *problem.window, shown, whole, chunk.first_row, *problem.sizes, tiles,
        WIDTH=problem.keys.shape[-1], CHUNK=launch.chunk, KEYS=launch.keys, num_warps=4,
    )  # fmt: skip
    return shown, whole


def _maxima(
    problem: Problem,
    launch: configs.SearchLaunch,
    chunk: Chunk,
    levels: list[Level],
    shown: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """The numbers of each level: (queries of the chunk, runs), but those of the first in pieces, tile after tile."""
    tiles = configs.blocks_of(problem.capacity, launch.keys)
    of_level = [problem.keys.new_empty((chunk.queries, level.runs), dtype=torch.float32) for level in levels]
    splits = configs.search_splits(target_of(problem.keys.device), chunk.blocks, tiles)
    knn_maxima_kernel[(chunk.blocks, splits)](
        problem.query, problem.keys, *problem.window, *(shown or (problem.keys, problem.keys)),
        of_level[0], of_level[min(1, len(levels) - 1)],
        chunk.first_block, chunk.first_query, chunk.queries, chunk.first_row, problem.queries_of_row,
        configs.blocks_of(problem.queries_of_row, launch.queries), *problem.sizes, tiles,
        WIDTH=problem.keys.shape[-1], CHUNK=launch.chunk, QUERIES=launch.queries, KEYS=launch.keys, RUN=launch.run,
        SPLITS=splits, SHOWN=shown is not None, TOPS=len(levels) > 1, PRECISION=launch.precision,
        num_warps=launch.warps, num_stages=launch.stages, **launch.options,
    )  # fmt: skip
    for fine, coarse, level, above in zip(of_level[1:], of_level[2:], levels[1:], levels[2:], strict=False):
        knn_coarsen_kernel[(chunk.queries, configs.blocks_of(above.runs, configs.SEARCH_BLOCK))](
            fine, coarse, *problem.window, chunk.first_query, problem.queries_of_row, *problem.sizes,
            level.runs, above.runs,
            RUN=level.run, FAN=configs.SEARCH_FAN, BLOCK=configs.SEARCH_BLOCK, num_warps=4,
        )  # fmt: skip
    return of_level


def _choose(
    problem: Problem, launch: configs.SearchLaunch, chunk: Chunk, levels: list[Level], maxima: list[Tensor]
) -> Tensor:
    """The K best runs of each query (queries of the chunk, LIST), older first, then -1."""
    parents, fan = maxima[-1], 0
    for number in range(len(levels) - 1, -1, -1):
        level = levels[number]
        of_tile = launch.keys // launch.run
        part, stride, tile_stride = (1 << 30, level.runs, 0) if number else (of_tile, of_tile, chunk.queries * of_tile)
        chosen = torch.empty((chunk.queries, launch.neighbours), dtype=torch.int32, device=problem.keys.device)
        held = launch.neighbours * fan if fan else max(configs.power_of_two(level.runs), launch.neighbours)
        knn_choose_kernel[(configs.blocks_of(chunk.queries, launch.selected),)](
            maxima[number], parents, chosen, *problem.window, chunk.first_query, chunk.queries,
            problem.queries_of_row, *problem.sizes, stride, tile_stride,
            RUN=level.run, PART=part, FAN=fan, K=problem.k, LIST=launch.neighbours, BLOCK=launch.selected, N=held,
            num_warps=configs.selection_warps(held),
        )  # fmt: skip
        parents, fan = chosen, level.run // levels[number - 1].run if number else 0
    return parents


def _score(
    problem: Problem, launch: configs.SearchLaunch, chunk: Chunk, shown: tuple[Tensor, Tensor] | None, runs: Tensor
) -> Tensor:
    """(queries of the chunk, LIST · RUN)."""
    candidates = torch.empty(
        (chunk.queries, launch.neighbours * launch.run), dtype=torch.float32, device=problem.keys.device
    )
    keys_of_row = configs.blocks_of(problem.capacity, launch.keys) * launch.keys
    keys = min(launch.scored, launch.scored_queries * candidates.shape[1])
    knn_score_kernel[(configs.blocks_of(chunk.queries, launch.scored_queries),)](
        problem.query, problem.keys, *problem.window, shown[0] if shown else problem.keys, runs, candidates,
        chunk.first_query, chunk.queries, chunk.first_row, problem.queries_of_row, *problem.sizes, keys_of_row,
        WIDTH=problem.keys.shape[-1], CHUNK=launch.chunk, BLOCK=launch.scored_queries, KEYS=keys,
        COLUMNS=launch.columns, RUN=launch.run, LIST=launch.neighbours, SHOWN=shown is not None,
        PRECISION=launch.precision, num_warps=launch.score_warps, num_stages=launch.score_stages, **launch.options,
    )  # fmt: skip
    return candidates


def _best(
    problem: Problem,
    launch: configs.SearchLaunch,
    chunk: Chunk,
    candidates: Tensor,
    runs: Tensor,
    scores: Tensor,
    slots: Tensor,
) -> None:
    knn_best_kernel[(configs.blocks_of(chunk.queries, launch.selected),)](
        candidates, runs, scores, slots, *problem.window, chunk.first_query, chunk.queries, problem.queries_of_row,
        *problem.sizes, candidates.shape[1],
        RUN=launch.run, K=problem.k, LIST=launch.neighbours, BLOCK=launch.selected,
        num_warps=configs.selection_warps(launch.neighbours * launch.run),
    )  # fmt: skip
