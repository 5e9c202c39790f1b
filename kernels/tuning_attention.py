"""Block sizes of the attention kernels: pure data and pure functions of the call's shape."""

from typing import NamedTuple


class Shape(NamedTuple):
    """What a configuration may depend on."""

    arch: int  #: compute capability, such as 90
    bytes: int  #: of an element of query, key and value
    size: int  #: the larger head size, rounded up to a power of two
    extras: int  #: how many of mask, bias and dropout are there: each holds registers for a tile


class Config(NamedTuple):
    block_m: int  #: queries of a block
    block_n: int  #: keys of a block
    num_warps: int
    num_stages: int


SPLIT = 256  # the least keys of a split: four blocks, so that reading them hides the start of a program
DELTA_ROWS = (
    64  # rows of output and its gradient that a program reads: enough loads in flight, no tile to hold
)
WEIGHTS_BLOCK = 64  # queries and keys of a block of weights that a program writes
BIAS_BLOCK = 32  # queries and keys of a block whose gradient a program holds over all batches and heads


# The largest of the tried blocks that the compiler fits into registers without spilling: for causal calls and, in the
# lines of extras, for all options at once (benchmarks/results/attention_compiled.jsonl). Larger blocks read less memory
# per product. (generation, extras) -> head size, rounded up -> Config.
FORWARD = {
    (80, False): {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(64, 64, 8, 2)},
    (80, True): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (90, False): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    (90, True): {64: Config(128, 32, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (100, False): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    (100, True): {64: Config(128, 32, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
}
KEYS = {
    (80, False): {64: Config(32, 64, 8, 2), 128: Config(32, 64, 8, 1), 256: Config(16, 64, 8, 1)},
    (80, True): {64: Config(16, 64, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    (90, False): {64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
    (90, True): {64: Config(16, 64, 8, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 64, 8, 1)},
    (100, False): {64: Config(64, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 64, 8, 1)},
    (100, True): {64: Config(16, 64, 8, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 64, 8, 1)},
}
QUERIES = {
    (80, False): {64: Config(64, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (80, True): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    (90, False): {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    (90, True): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (100, False): {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    (100, True): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
}
# float32 is multiplied without tensor cores, the operands of each product in registers: small blocks everywhere. Two
# stages keep the passing operands in shared memory, which freed registers where one stage spilled.
FLOAT32 = {
    "forward": {64: Config(64, 32, 8, 2), 128: Config(32, 16, 8, 1), 256: Config(32, 16, 8, 1)},
    "keys": {64: Config(32, 32, 16, 2), 128: Config(32, 32, 16, 2), 256: Config(16, 16, 4, 2)},
    "queries": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
}
DECODE = {64: (64, 4, 3), 128: (64, 4, 3), 256: (64, 8, 3)}  # head size -> block_n, num_warps, num_stages
# Shared memory of a program on consumer GPUs (sm_86, sm_89, sm_120) is 99 KiB, of the others at least 163.
SMALL = frozenset((86, 89, 120, 121))


def pick(table: dict, exact: dict, s: Shape) -> Config:
    size = max(64, s.size)
    if s.bytes == 4:
        return exact[size]
    if s.arch in SMALL:  # what holds all options on sm_80 is what fits
        return table[80, True][size]
    return table[min(s.arch // 10 * 10, 100) if s.arch >= 90 else 80, s.extras > 0][size]


def forward_config(s: Shape) -> Config:
    return pick(FORWARD, FLOAT32["forward"], s)


def keys_config(s: Shape) -> Config:
    """Of the gradient of keys and values: block_n keys stay, blocks of block_m queries pass."""
    return pick(KEYS, FLOAT32["keys"], s)


def queries_config(s: Shape) -> Config:
    """Of the gradient of queries: block_m queries stay, blocks of block_n keys pass."""
    return pick(QUERIES, FLOAT32["queries"], s)


def is_decode(L: int, S: int, G: int) -> bool:
    """Whether the keys are split: queries times heads of a group fit a tile, and the keys make several splits."""
    return 1 <= L <= 16 and L * G <= 64 and S > 2 * SPLIT


def split_size(S: int) -> int:
    """Keys of one split: a power of two from SPLIT on, such that there are at most 64 splits to combine."""
    size = SPLIT
    while size * 64 < S:
        size *= 2
    return size


def decode_config(s: Shape, rows: int) -> Config:
    """block_m holds the queries of all heads of a group: at least 16, the least of a tensor product."""
    block_m = 16
    while block_m < rows:
        block_m *= 2
    if s.bytes == 4:
        return Config(block_m, 16, 8, 1)
    return Config(block_m, *DECODE[max(64, s.size)])
