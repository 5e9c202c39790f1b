"""Block sizes of the attention kernels: pure data and pure functions of the call's shape."""

from typing import NamedTuple


class Shape(NamedTuple):
    """What a configuration may depend on."""

    arch: int  #: compute capability, 80, 90, 100
    bytes: int  #: of an element of query, key and value
    size: int  #: the larger head size, rounded up to a power of two
    L: int
    S: int
    extras: int  #: how many of mask, bias and dropout are there: each holds registers for a tile


class Config(NamedTuple):
    block_m: int  #: queries of a block
    block_n: int  #: keys of a block
    num_warps: int
    num_stages: int


SPLIT = 256  # the least keys of a split: four blocks, so that reading them hides the start of a program
DELTA_ROWS = (
    64  # rows of output and its gradient that a program reads: enough loads in flight, and no tile to hold
)
WEIGHTS_BLOCK = 64  # queries and keys of a block of weights that a program writes
BIAS_BLOCK = (
    32  # queries and keys of a block whose gradient a program holds while it sums over batches and heads
)


def keys_config(s: Shape) -> Config:
    """Of the gradient of keys and values: block_n keys stay, blocks of block_m queries pass."""
    if s.bytes == 4:
        return Config(32, 32, 4, 1)
    if s.size <= 64:
        return Config(64, 64, 4, 2)
    if s.size <= 128:
        return Config(64, 64, 8, 2)
    return Config(32, 32, 4, 1)


def queries_config(s: Shape) -> Config:
    """Of the gradient of queries: block_m queries stay, blocks of block_n keys pass."""
    if s.bytes == 4:
        return Config(32, 32, 4, 1)
    if s.size <= 64:
        return Config(64, 64, 4, 2)
    if s.size <= 128:
        return Config(64, 64, 8, 2)
    return Config(32, 32, 4, 1)


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
    block_m = 16
    while block_m < rows:
        block_m *= 2
    if s.bytes == 4:
        return Config(block_m, 32, 4, 2)
    return Config(block_m, 64 if s.size <= 128 else 32, 4, 3)


def forward_config(s: Shape) -> Config:
    if s.bytes == 4:
        return Config(32, 32, 4, 2) if s.size > 64 else Config(64, 32, 4, 2)
    if s.L <= 64:
        return Config(64, 64, 4, 2)
    if s.size <= 128:
        return Config(128, 64, 4 if s.size <= 64 else 8, 3)
    return Config(64, 32, 4, 2)
