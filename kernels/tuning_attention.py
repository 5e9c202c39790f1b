"""Block sizes of the attention kernels: pure data and pure functions of the call's shape.

What was forced or measured (`tuning_cache`) comes before the rules where `choose` is asked.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

from seqkern.kernels.tuning import limits, power
from seqkern.kernels.tuning_cache import preferred


class Shape(NamedTuple):
    """What a configuration may depend on."""

    arch: int  #: compute capability, such as 90
    bytes: int  #: of an element of query, key and value
    size: int  #: the larger head size, rounded up to a power of two
    extras: int  #: how many of mask, bias and dropout are there: each holds registers for a tile
    rows: int = 1  #: queries of all heads of a group, which a program of decode holds
    tf32: bool = False  #: whether float32 is multiplied on tensor cores


class Config(NamedTuple):
    block_m: int  #: queries of a block
    block_n: int  #: keys of a block
    num_warps: int
    num_stages: int


SPLIT = 256  # the least keys of a split: four blocks, so that reading them hides the start of a program
DELTA_ROWS = (
    64  # rows of output and its gradient that a program reads: enough loads in flight, no tile to hold
)


# Of sm_90: the fastest on an H200 (docs/decisions.md), which for 64 rows are four warps: eight would share the
# columns of a product among warp groups. Of the others: the largest of the tried blocks that the compiler fits into
# registers without spilling, for causal calls and, in the last line, for all options at once
# (benchmarks/results/attention_compiled.jsonl).
# (generation, extras, where 2 stands for more) -> head size, rounded up -> Config.
FORWARD = {
    (80, 0): {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(64, 64, 8, 2)},
    (80, 2): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (90, 0): {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    (90, 1): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 1)},
    (90, 2): {64: Config(128, 32, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (100, 0): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    (100, 2): {64: Config(128, 32, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
}
KEYS = {
    (80, 0): {64: Config(32, 64, 8, 2), 128: Config(32, 64, 8, 1), 256: Config(16, 64, 8, 1)},
    (80, 2): {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(32, 16, 8, 1)},
    (90, 0): {64: Config(64, 64, 4, 2), 128: Config(32, 64, 4, 2), 256: Config(32, 64, 8, 2)},
    (90, 1): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(32, 32, 8, 1)},
    (90, 2): {64: Config(32, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(32, 32, 8, 1)},
    (100, 0): {64: Config(64, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 64, 8, 1)},
    (100, 2): {64: Config(32, 64, 8, 1), 128: Config(32, 64, 8, 1), 256: Config(32, 32, 8, 1)},
}
QUERIES = {
    (80, 0): {64: Config(64, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    (80, 2): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    (90, 0): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    (90, 1): {64: Config(64, 32, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(64, 32, 8, 1)},
    (90, 2): {64: Config(64, 32, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(64, 32, 8, 1)},
    (100, 0): {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)},
    (100, 2): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 1)},
}
# float32 is multiplied without tensor cores, the operands of each product in registers: small blocks everywhere. Two
# stages keep the passing operands in shared memory, which freed registers where one stage spilled.
FLOAT32 = {
    "forward": {64: Config(64, 32, 8, 2), 128: Config(32, 16, 8, 1), 256: Config(32, 16, 8, 1)},
    "keys": {64: Config(32, 32, 16, 2), 128: Config(32, 32, 16, 2), 256: Config(16, 16, 4, 2)},
    "queries": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
}
TF32 = {
    "forward": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 1), 256: Config(32, 32, 8, 1)},
    "keys": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(32, 16, 8, 1)},
    "queries": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
}
# The least keys (in `keys` queries) that a product of weights sums over on tensor cores. Triton 3.6 lays out its left
# operand by the narrowest number that it was made of: the bytes of a mask make groups of four, which need 32, and with
# 16 the product is wrong.
LEAST_SUMMED = 32
DECODE = {64: (64, 4, 3), 128: (64, 4, 3), 256: (64, 8, 3)}  # head size -> block_n, num_warps, num_stages
# Shared memory of a program on consumer GPUs (sm_86, sm_89, sm_120) is 99 KiB, of the others at least 163.
SMALL = frozenset((86, 89, 120, 121))


def may_be_tf32(arch: int, size: int) -> bool:
    """Whether float32 heads of a size fit into shared memory on the way to tensor cores; if not they go without."""
    return arch not in SMALL or size <= 128


def weights_block(s: Shape) -> int:
    """Queries and keys of a block of weights that a program writes."""
    return 32 if s.bytes == 4 and s.size > 128 and s.arch in SMALL else 64


def pick(kernel: str, table: dict, s: Shape) -> Config:
    size = max(64, s.size)
    if s.bytes == 4:
        return (TF32 if s.tf32 else FLOAT32)[kernel][size]
    if s.arch in SMALL:  # what holds all options on sm_80 is what fits
        return table[80, 2][size]
    generation = min(s.arch // 10 * 10, 100) if s.arch >= 90 else 80
    most = 1 if generation == 90 and s.extras == 1 else 2
    return table[generation, most if s.extras else 0][size]


def forward_config(s: Shape) -> Config:
    return pick("forward", FORWARD, s)


def keys_config(s: Shape) -> Config:
    """Of the gradient of keys and values: block_n keys stay, blocks of block_m queries pass."""
    return pick("keys", KEYS, s)


def queries_config(s: Shape) -> Config:
    """Of the gradient of queries: block_m queries stay, blocks of block_n keys pass."""
    return pick("queries", QUERIES, s)


def bias_config(s: Shape) -> Config:
    """Of the gradient of a bias: a program holds that of a block, which all batches and heads that share it pass."""
    return (
        Config(64, 64, 4, 1)
        if s.bytes == 2 and s.size <= 128 and s.arch not in SMALL
        else Config(32, 32, 4, 1)
    )


def is_decode(L: int, S: int, G: int) -> bool:
    """Whether the keys are split: queries times heads of a group fit a tile, and the keys make several splits."""
    return 1 <= L <= 16 and L * G <= 64 and S > 2 * SPLIT


def split_size(S: int) -> int:
    """Keys of one split: a power of two from SPLIT on, such that there are at most 64 splits to combine."""
    size = SPLIT
    while size * 64 < S:
        size *= 2
    return size


def decode_config(s: Shape) -> Config:
    """block_m holds the queries of all heads of a group: at least 16, the least of a tensor product."""
    block_m = power(s.rows, 16)
    if s.bytes == 4:
        return Config(block_m, LEAST_SUMMED if s.tf32 else 16, 8, 1)
    found = Config(block_m, *DECODE[max(64, s.size)])
    # Fewer stages where keys and values of all would not fit beside a tile of weights, and of bias and mask in flight.
    while found.num_stages > 1:
        tile = s.bytes + 3 * (found.num_stages - 1) * (s.extras > 0)
        if shared_bytes("decode", s, found) + tile * block_m * found.block_n + 2048 <= limits(s.arch).shared:
            break
        found = found._replace(num_stages=found.num_stages - 1)
    return found


class Kernel(NamedTuple):
    """A kernel whose configuration is chosen."""

    rule: Callable[[Shape], Config]
    staying: int  #: operands of which a block stays in a program, and tiles of scores; of two, blocks pass
    sums: int  #: that grow while they pass


KERNELS = {
    "forward": Kernel(forward_config, 1, 1),
    "keys": Kernel(keys_config, 2, 2),
    "queries": Kernel(queries_config, 2, 1),
    "decode": Kernel(decode_config, 1, 1),
    "bias": Kernel(bias_config, 2, 0),
}
BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)  # that are tried


def sides(kernel: str, c: Config) -> tuple[int, int]:
    """Rows of the blocks that stay, and of those that pass."""
    return (c.block_n, c.block_m) if kernel == "keys" else (c.block_m, c.block_n)


def shared_bytes(kernel: str, s: Shape, c: Config) -> int:
    """A lower bound of the shared memory of a program, held to the compilers' figures by a test.

    What stays, and a block of what passes for each stage but the one that is read; Hopper keeps one more.
    """
    staying, passing = sides(kernel, c)
    rows = KERNELS[kernel].staying * staying + 2 * (c.num_stages - 1) * passing
    return rows * max(64, s.size) * s.bytes


def registers(kernel: str, s: Shape, c: Config) -> int:
    """Of a thread, for the sums and the scores alone."""
    staying, passing = sides(kernel, c)
    columns = KERNELS[kernel].sums * max(64, s.size) + (KERNELS[kernel].staying + s.extras) * passing
    return staying * columns // (32 * c.num_warps)


def usable(kernel: str, s: Shape, c: Config) -> bool:
    """Whether a configuration that is no rule's gives right results, and may fit."""
    whole = kernel != "decode" or (c.block_m >= s.rows and SPLIT % c.block_n == 0)
    if kernel != "bias" and (s.bytes == 2 or s.tf32) and s.extras:
        whole = whole and (c.block_m if kernel == "keys" else c.block_n) >= LEAST_SUMMED
    return whole and min(c.block_m, c.block_n) >= 16 and shared_bytes(kernel, s, c) <= limits(s.arch).shared


def key(kernel: str, s: Shape) -> str:
    """The name under which a measured choice is kept: what the rules look at, and how float32 is multiplied.

    Not batch, lengths or what is causal: a sequence gives the same bits in any batch and beside any padding, one
    measurement serves every call, and a causal program runs the loops of one that sees everything.
    """
    kind = f"{8 * s.bytes}-bit" + "-tf32" * s.tf32
    rows = f"|M{power(s.rows, 16)}" if kernel == "decode" else ""
    extras = ("plain", "extra", "extras")[min(s.extras, 2)]
    return f"attention_{kernel}|{kind}|D{max(64, s.size)}|{extras}{rows}"


def near(n: int) -> list[int]:
    return [b for b in BLOCKS if n <= 2 * b <= 4 * n]


def fewer_stages(kernel: str, s: Shape, c: Config) -> Config | None:
    """The configuration with as many of its stages as may fit."""
    fewer = (c._replace(num_stages=n) for n in range(c.num_stages, 0, -1))
    return next((each for each in fewer if usable(kernel, s, each)), None)


def candidates(kernel: str, s: Shape) -> list[Config]:
    """The rule's configuration, then its neighbours: other warps and stages, blocks of half and twice the size."""
    rule = KERNELS[kernel].rule(s)
    found = [rule._replace(num_warps=w, num_stages=n) for w, n in product(WARPS, STAGES)]
    queries = (rule.block_m,) if kernel == "decode" else near(rule.block_m)
    for m, n, w in product(queries, near(rule.block_n), WARPS):
        found.append(rule._replace(block_m=m, block_n=n, num_warps=w))
    # The rest of a thread's 255 registers are for operands, which without tensor cores take most of them. What spills
    # is slow, and may take a minute to compile.
    most = max(registers(kernel, s, rule), 32 if s.bytes == 4 and not s.tf32 else 128)
    fitting = [fewer_stages(kernel, s, c) for c in found if registers(kernel, s, c) <= most]
    return list(dict.fromkeys([rule, *filter(None, fitting)]))


def choose(kernel: str, s: Shape) -> Config:
    """The configuration of a call of one of `KERNELS`."""
    found = preferred(key(kernel, s))
    if found is not None and usable(kernel, s, Config(*found)):
        return Config(*found)
    return KERNELS[kernel].rule(s)
