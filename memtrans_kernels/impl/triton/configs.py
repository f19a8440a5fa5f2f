"""Every block size of the Triton kernels, by the shape that decides it."""

from __future__ import annotations

from typing import NamedTuple

from memtrans_kernels.impl.triton.targets import Target


class Launch(NamedTuple):
    """Rows that one program handles at a time, and its warps."""

    block: int
    warps: int


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: Triton's block sizes."""
    return 1 << max(0, number - 1).bit_length()


def blocks_of(number: int, block: int) -> int:
    """How many blocks hold so many. `triton.cdiv` asks first whether it runs in a kernel: 5 us."""
    return -(-number // block)


def ring_write(width: int) -> Launch:
    """One program owns a memory row, so it needs many warps to keep enough bytes in flight.

    H200, 16 rows of 512 x 64: 8.3 us with 16 warps, 7.1 with 32; 128 rows of 512 x 128: 26.5 and 21.9 us.
    """
    return Launch(block=max(1, 16384 // power_of_two(width)), warps=32)


def cosine(width: int) -> Launch:
    """About 2048 numbers a program. H200, 16 x 8 x 512 queries and as many keys of 128: 19.7 us, with 4096 22.3."""
    return Launch(block=max(1, 2048 // power_of_two(width)), warps=4)


def merge(candidates: int) -> Launch:
    """Of the N·K candidates of a share and head: eight a thread, whose searches wait for memory together. So the kernel
    takes 92 registers a thread for sm_90; with 2048 candidates 231, and with 4096 it spills. Not measured yet."""
    return Launch(block=min(1024, power_of_two(candidates)), warps=4)


LARGEST_TILE = 128  # queries or local keys that attention handles at a time


class AttentionLaunch(NamedTuple):
    """Queries and local keys of a tile, warps, tiles in flight, and neighbours whose rows are in flight together."""

    queries: int
    keys: int
    warps: int
    stages: int
    unroll: int = 1


def block_width(width: int) -> int:
    """Columns of a tile whose rows have this width: at least what a product takes."""
    return max(16, power_of_two(width))


def neighbours_at_once(neighbours: int, queries: int) -> int:
    """Logits of a query's neighbours that are in registers together: 8,192 numbers of a program leave room for two
    programs, not four. H200, D 64, K 256, forward: 0.53 ms, with 128 of 64 queries 1.85."""
    return min(4096 // queries, power_of_two(neighbours))


def neighbours_of_one_query(neighbours: int, width: int) -> int:
    """Neighbours that are gathered together: up to 16,384 numbers are in the registers of a program of four warps."""
    return min(power_of_two(neighbours), 16384 // block_width(width))


def small_tiles(width: int) -> AttentionLaunch:
    """For AMD's consumer GPUs, 256 registers a lane, whose products hold each operand twice. Compiled for a gfx1100 and
    not measured: bytes of stack a thread of the kernel over keys 0 at D 64 and 272 at D 128; with 64 queries, 64 keys
    and 4 warps 1,456 and 1,552.
    """
    if width <= 64:
        return AttentionLaunch(queries=32, keys=32, warps=8, stages=1)
    return AttentionLaunch(queries=16, keys=16, warps=4, stages=1)


def has_few_registers(target: Target) -> bool:
    """Whether tiles have to be small for that."""
    return target.vendor == "amd" and 1000 <= target.architecture < 2000


LONG = 4096  # local keys from which on a program spends its time in the loop over them


def attention_forward(
    target: Target, itemsize: int, width: int, length: int, local_keys: int, neighbours: int
) -> AttentionLaunch:
    """Measured on an H200, bf16, B=16 H=8 N=512; microseconds of the kernel.

    K 32, L 512: D 64 82 against 89 with 32 keys, 103 with 32 queries, 94 with four neighbours in flight; D 128 193
    against 278 with 64 queries. D 256, milliseconds: 0.431 against 0.655 with 8 warps and two tiles in flight. Without
    neighbours, D 64, L 512: 25.8 against 30.2 with 32 keys, 29.5 with 128 queries, 30.5 with 128 keys, 29.4 with one
    tile in flight; L 1024 51.6, D 128 42.5 (47.8 with 128 queries of 8 warps). Of 8,704 keys larger tiles read them
    less often: 442 against 456 with 64 queries, 518 with 128 of 4 warps.
    """
    if itemsize > 2:
        return AttentionLaunch(queries=16 if length <= 16 or width > 128 else 32, keys=32, warps=4, stages=1)
    if width > 128:
        return AttentionLaunch(queries=16 if length <= 16 else 32, keys=32, warps=4, stages=1, unroll=2)
    if length <= 16 and local_keys <= 64:
        return AttentionLaunch(queries=16, keys=64, warps=2, stages=2, unroll=8)
    if length <= 16:
        return AttentionLaunch(queries=16, keys=128, warps=4, stages=2, unroll=8)
    if has_few_registers(target):
        return small_tiles(width)
    if width <= 64 and neighbours == 0 and local_keys >= LONG:
        return AttentionLaunch(queries=128, keys=64, warps=8, stages=3)
    if neighbours == 0:
        return AttentionLaunch(queries=64, keys=64, warps=4, stages=2)
    if width <= 64:
        return AttentionLaunch(queries=64, keys=64, warps=4, stages=2, unroll=2)
    return AttentionLaunch(queries=32, keys=64, warps=4, stages=2, unroll=4)


class WholeLaunch(NamedTuple):
    """Queries and keys of a tile, keys of one that is looked at with care, warps, tiles in flight, and registers that a
    thread may have, 0 for as many as it likes."""

    queries: int
    keys: int
    careful_keys: int
    warps: int
    stages: int
    registers: int = 0


def whole_attention(target: Target, itemsize: int, width: int) -> WholeLaunch:
    """Measured on an H200, bf16, B=16 H=8 N=512 of 8,704 slots; milliseconds, of which 0.012 went to a look at all keys
    that is no more.

    D 64: 0.291 against 0.292 with 64 queries of 4 warps, 0.304 with 4 warps, 0.315 with 32 keys of four tiles in
    flight, 0.349 with two tiles in flight, 0.351 with 256 queries, 0.492 with 128 keys. D 128: 0.524 against 0.639 with
    64 queries of 4 warps and two tiles in flight, 0.662 with 128 keys and two. Two programs of 8 warps have 128
    registers a thread; compiled for sm_90, D 64 takes 156, and what spills of 128 is outside the loop over whole tiles.
    """
    if itemsize > 2:
        return WholeLaunch(queries=32 if width <= 128 else 16, keys=32, careful_keys=32, warps=4, stages=1)
    if has_few_registers(target):
        queries, keys, warps, stages, _ = small_tiles(width)
        return WholeLaunch(queries, keys, keys, warps, stages)
    if width > 128:
        return WholeLaunch(queries=32, keys=32, careful_keys=32, warps=4, stages=1)
    if target.vendor == "nvidia" and target.architecture == 90:
        registers = 128 if width <= 64 else 0
        return WholeLaunch(queries=128, keys=64, careful_keys=32, warps=8, stages=3, registers=registers)
    return WholeLaunch(queries=64, keys=64, careful_keys=64, warps=4, stages=2)


class OneQueryLaunch(NamedTuple):
    """Local keys of a tile and of one part, warps, tiles in flight."""

    keys: int
    of_part: int
    warps: int
    stages: int


MOST_PARTS = 16  # of the local keys of one query: merging reads them all


def attention_one_query(itemsize: int, width: int, local_keys: int) -> OneQueryLaunch:
    """A tile a part, unless that makes too many parts.

    H100, bf16, H=8 D=64 K=32, microseconds, with 64 keys, 128, and 32 of 2 warps; in brackets one program a head. B 16,
    L 1024: 6.3, 5.9 and 6.1 (12.4); a token of sixteen documents 629.0, 630.5 and 629.1. B 16, L 512: 5.3, 5.6 and 5.2
    (8.0). B 1, L 1024: 4.6, 4.7 and 5.0 (11.8). A single tile, L 1, in two launches: 4.6, in one 3.4.
    """
    keys = 32 if itemsize > 2 or width > 128 else 64
    tiles = -(-local_keys // keys)
    of_part = keys * max(1, -(-tiles // MOST_PARTS))
    return OneQueryLaunch(keys, of_part, warps=4, stages=1 if itemsize > 2 else 2)


def attention_query_gradient(
    target: Target, itemsize: int, width: int, length: int, neighbours: int
) -> AttentionLaunch:
    """Few queries: their rows and those of two neighbours' keys and values are in registers. Measured as above.

    K 32, L 512: D 64 160 against 195 with 32 keys, 207 with 64 queries of 32; D 128 340 against 362 with 64 keys, 514
    with 64 queries. D 256, milliseconds, forward pass included: 2.09 against 2.71 with 32 queries of 8 warps. Without
    neighbours there is room for larger tiles. D 64: 35.2 of L 512, 67.3 of 1024 and 680 of 8,704 against 38.9, 73.7
    and 689 with 64 keys; with 128 queries 44.1 and more. D 128: 65.1 against 71.5 with 32 keys. float32, D 128,
    compiled for sm_90 and not measured: 392 bytes of stack a thread with 8 warps, 6,424 with 4.
    """
    if itemsize > 2:
        few = length <= 16 or width > 128
        return AttentionLaunch(queries=16 if few else 32, keys=32, warps=8 if width > 64 and not few else 4, stages=1)
    if width > 128:
        return AttentionLaunch(queries=16, keys=32, warps=4, stages=1, unroll=2)
    if length <= 16:
        return AttentionLaunch(queries=16, keys=64, warps=4, stages=1, unroll=4)
    if has_few_registers(target):
        return small_tiles(width)
    if neighbours == 0:
        keys, stages = (32, 3) if width <= 64 else (64, 2)
        return AttentionLaunch(queries=64, keys=keys, warps=4, stages=stages)
    if width <= 64:
        return AttentionLaunch(queries=32, keys=64, warps=4, stages=2, unroll=4)
    return AttentionLaunch(queries=32, keys=32, warps=4, stages=2, unroll=2)


def attention_key_gradient(target: Target, itemsize: int, width: int) -> AttentionLaunch:
    """Two tiles in flight, without neighbours, measured as above: D 64 65 against 71 with one, 69 with 128 keys of 8
    warps, 80 with 32 queries; D 128 114 against 122 with one, 112 with 64 queries and 128 keys of 8 warps. Where nobody
    measured, one: for an sm_80 Triton 3.9 makes of two 32 registers and 3,056 bytes of stack a thread. D 256, compiled
    for sm_90 and not measured: no stack with 32 keys of 4 warps, 912 bytes a thread with 64 keys of 8 warps.
    """
    if itemsize > 2:
        block = 32 if width <= 128 else 16
        return AttentionLaunch(queries=block, keys=block, warps=4, stages=1)
    if width > 128:
        return AttentionLaunch(queries=32, keys=32, warps=4, stages=1)
    if has_few_registers(target):
        return small_tiles(width)
    stages = 2 if target.vendor == "nvidia" and target.architecture == 90 else 1
    return AttentionLaunch(queries=64 if width <= 64 else 32, keys=64, warps=4, stages=stages)


# Four for each multiprocessor of a large GPU: of a causal block the first keys have the most queries, so that more
# programs are a better balance, and more parts to add up. H200, microseconds with 256, 512 and 1024: D 64, L 512 55.0,
# 49.2 and 53.0, L 1024 100, 102 and 98; D 128, L 512 101, 91 and 101.
KEY_GRADIENT_PROGRAMS = 512


def head_parts(programs: int, heads: int) -> int:
    """Into how many parts the heads that share keys are split, so that there are enough programs."""
    return max(1, min(heads, KEY_GRADIENT_PROGRAMS // programs))


# Programs that share the documents and blocks of queries of one tile of the bias gradient: fewer leave multiprocessors
# idle, more write more partial sums.
BIAS_PARTS = 16


# The most tiles of a block of queries that the gradient of keys leaves for that of a bias: 512 numbers a query, in
# float32 256. Those of a long table would take as much memory as dense attention, and are computed again.
NEAR_PLACES = 8


def attention_bias_gradient(target: Target, itemsize: int, width: int) -> AttentionLaunch:
    """Square tiles: as many keys as queries. A second one in flight saves 0.003 ms at D 64; it would save 0.008
    at D 128, in 133 KB of shared memory, which few GPUs have."""
    block = 32 if itemsize > 2 else 64
    if width > 128:
        return AttentionLaunch(queries=block // 2, keys=block // 2, warps=4, stages=1)
    if itemsize == 2 and has_few_registers(target):
        return small_tiles(width)
    return AttentionLaunch(queries=block, keys=block, warps=4, stages=2 if itemsize == 2 and width <= 64 else 1)


class SearchLaunch(NamedTuple):
    """Of the search: how its steps are cut."""

    queries: int  # of a program that computes maxima
    keys: int  # of a tile
    chunk: int  # columns of D that are multiplied together
    warps: int
    stages: int
    run: int  # entries of which only the largest product is kept
    scored: int  # keys of a tile that is scored again
    scored_queries: int  # of so many queries
    score_warps: int
    score_stages: int
    columns: int  # columns beside these keys, each a query: as few as tensor cores multiply
    neighbours: int  # K up to a power of two
    selected: int  # queries of a program that selects
    held: int  # maxima of a query that one program holds
    shown: bool  # whether a step of its own looks for what must not be found
    precision: str  # "ieee", "three" products of tensor-float-32 parts, or "elements" in the interpreter
    options: dict[str, int]  # of Triton's compiler for this vendor


KNOWN_VENDORS = ("nvidia", "amd")
SEARCH_FAN = 8  # children of a run of a level beyond the second
SEARCH_BLOCK = 128  # runs of a program that coarsens
SEARCH_FEW_QUERIES = 64  # of a memory row: one program sees each key


class SearchTile(NamedTuple):
    """Queries and keys of a tile of products, warps, tiles in flight; the columns of D that are multiplied together."""

    queries: int
    keys: int
    warps: int
    stages: int
    columns: int = 256


# For each size of shared memory that targets have, in KB: the bytes of a key up to which a tile serves, and the tile.
# 200 KB: H100, B=16 H=8 N=512 K=32, 64k entries, the maxima alone in ms. fp16, D 64: 1.34; with 3 stages 1.37, with 2
# 1.86, 8 warps 1.88, 64 queries 1.47. D 128: 2.42 to 2.60; with 3 stages 2.76. float32, D 64: 7.2; 128 keys 8.3, 64
# queries of 128 keys 13.4.
SEARCH_TILES: dict[int, dict[tuple[int, int], SearchTile]] = {
    200: {
        (2, 128): SearchTile(128, 128, 4, 4),
        (2, 256): SearchTile(128, 128, 8, 2),
        (2, 512): SearchTile(64, 64, 4, 2),
        (2, 4096): SearchTile(128, 128, 8, 3, columns=64),
        (4, 256): SearchTile(128, 64, 8, 2),
        (4, 8192): SearchTile(64, 64, 4, 1, columns=64),
    },
    160: {
        (2, 128): SearchTile(128, 128, 4, 4),
        (2, 256): SearchTile(128, 128, 8, 2),
        (2, 512): SearchTile(64, 64, 4, 2),
        (2, 4096): SearchTile(128, 128, 8, 3, columns=64),
        (4, 8192): SearchTile(64, 64, 8, 1, columns=64),  # 128 queries of 64 keys spill 5 KB a thread on an sm_80
    },
    99: {
        (2, 128): SearchTile(64, 128, 4, 2),
        (2, 256): SearchTile(64, 64, 4, 2),
        (2, 512): SearchTile(64, 64, 4, 1, columns=128),
        (2, 4096): SearchTile(64, 128, 4, 2, columns=64),
        (4, 8192): SearchTile(64, 64, 8, 1, columns=64),
    },
    0: {
        (2, 4096): SearchTile(64, 64, 4, 1, columns=128),  # of 128 keys 684 bytes a thread spill on a gfx1100
        (4, 8192): SearchTile(64, 64, 4, 1, columns=32),
    },
}


SEARCH_INTERPRETED = SearchTile(16, 256, 1, 1, columns=64)  # few steps: the interpreter is slow at each, not at numbers


def search_tile(target: Target, itemsize: int, width: int) -> SearchTile:
    """The largest that fits; the smallest where nobody knows the GPU."""
    if target.vendor == "interpreter":
        return SEARCH_INTERPRETED
    room = target.shared_memory // 1024 if target.vendor in KNOWN_VENDORS else 0
    tiles = next(tiles for least, tiles in SEARCH_TILES.items() if room >= least)
    return next(tile for (size, most), tile in tiles.items() if size == itemsize and width * itemsize <= most)


def search(
    target: Target, itemsize: int, width: int, capacity: int, neighbours: int, queries_of_row: int
) -> SearchLaunch:
    """Runs of 16 halve what the maxima write, those of 8 what is scored again: H100, D 64, 2.3 ms against 2.5 with 64k
    entries, 0.97 against 0.83 with 8k; D 128, 64k, 4.1 against 3.8.

    One warp scores a tile quickest (0.55 ms; four 0.59, without a second tile in flight 0.71), but on a GPU that has
    another unit for products of large tiles, four must, or their bits differ.
    """
    tile = search_tile(target, itemsize, width)
    few = queries_of_row <= SEARCH_FEW_QUERIES
    interpreted = target.vendor == "interpreter"
    large_only = target.vendor == "nvidia" and target.architecture // 10 in (10, 11)
    thin = itemsize == 2 and not large_only
    return SearchLaunch(
        queries=min(tile.queries, 64) if few else tile.queries,
        keys=tile.keys,
        chunk=min(power_of_two(max(width, 16)), tile.columns),
        warps=min(tile.warps, 4) if few else tile.warps,
        stages=tile.stages,
        run=16 if width * itemsize <= 128 and capacity > 16384 and tile.keys >= 128 else 8,
        scored=1024 if interpreted else 64 if thin else 128,
        scored_queries=8 if interpreted else 1,
        score_warps=(1 if width <= 64 else 2) if thin else 4,
        score_stages=min(tile.stages, 2),
        columns=16 if target.vendor == "amd" or large_only else 8,
        neighbours=max(16, power_of_two(neighbours)),
        selected=16 if interpreted else 1,
        held=512,
        shown=not few,
        precision=search_precision(target, itemsize, width),
        options={"matrix_instr_nonkdim": 16} if target.vendor == "amd" else {},
    )


def search_precision(target: Target, itemsize: int, width: int) -> str:
    """Three products lose up to eight units in the last place of each, one float32 accumulation D + 2 of them."""
    if target.vendor == "interpreter":
        return "elements"
    return (
        "three" if itemsize == 4 and width > 16 and target.vendor == "nvidia" and target.architecture >= 80 else "ieee"
    )


def search_splits(target: Target, blocks: int, tiles: int) -> int:
    """Programs that share the tiles of a block of queries: about eight rounds of all multiprocessors."""
    wanted = -(-8 * target.multiprocessors // blocks)
    return power_of_two(max(1, min(wanted, tiles // 4)))


def selection_warps(held: int) -> int:
    """One warp a query needs no barriers; 32 numbers a lane are in registers."""
    return max(1, min(8, held // 1024))
