"""Which configuration a recurrent kernel is launched with: pure functions of architecture, dtype and sizes.

The rules were made from compilers' reports of registers, spills and shared memory, not from timings. What was measured
(`tuning_cache`) comes before them.
"""

from typing import NamedTuple

import torch

from seqkern.kernels import tuning_cache


class Arch(NamedTuple):
    """What a block of one architecture may use."""

    shared: int  # bytes of shared memory
    blocks: int  # multiprocessors of its usual GPU: how many blocks run at once


# Shared memory per block by the CUDA programming guide, table of compute capabilities: the multiprocessor's less 1 KB.
ARCHS = {
    80: Arch(163 * 1024, 108),
    86: Arch(99 * 1024, 84),
    89: Arch(99 * 1024, 128),
    90: Arch(227 * 1024, 132),
    100: Arch(227 * 1024, 148),
    120: Arch(99 * 1024, 170),
}
REGISTERS = 255  # that one thread can name


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    BLOCK_B: int  # sequences
    BLOCK_H: int  # hidden units; for a sequence all of them
    BLOCK_K: int  # depth of the matmul; for a sequence all outputs
    warps: int
    stages: int


def precision(dtype: torch.dtype) -> str:
    """How a matmul rounds its operands; TF32 where torch's own matmuls were told so."""
    return (
        "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    )


class Problem(NamedTuple):
    """What a configuration is chosen for."""

    kernel: str  # sequence_, persistent_ or step_, then forward or backward
    cell: str
    G: int
    R: int
    has_c: bool
    dtype: torch.dtype
    tensor_cores: bool  # whether a matmul of this dtype and precision runs on them
    B: int
    H: int
    P: int
    D: int
    projects: bool

    @property
    def key(self) -> str:
        """The name under which a measured choice is kept: sizes of batch rounded up to a power of two."""
        kind = str(self.dtype)[6:] + ("" if self.tensor_cores or self.dtype != torch.float32 else "-ieee")
        return f"{self.kernel}|{self.cell}|{kind}|B{power(self.B)}|H{self.H}|P{self.P}|D{self.D}"


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that holds n and is at least so large."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def arch_of(device: torch.device) -> int:
    """Compute capability times ten of a device; the interpreter, which has no limits, passes for sm_90."""
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return 86  # whose limits are the smallest; AMD's numbers are not CUDA's
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def limits(arch: int) -> Arch:
    """Of the newest architecture that is no newer; of the smallest for one older than all."""
    known = (
        [a for a in ARCHS if a <= arch and a // 10 == arch // 10] or [a for a in (86,) if arch < 120] or [120]
    )
    return ARCHS[max(known)]


def weight_bytes(p: Problem) -> int:
    """Shared memory of the weights that a sequence keeps on chip."""
    h, k = power(p.H, 16), power(p.P, 16)
    return (p.G + p.projects) * h * k * p.dtype.itemsize


def shared_bytes(p: Problem, c: Config) -> int:
    """An upper bound of the shared memory of a sequence kernel, held to the compilers' figures by a test."""
    tile = c.BLOCK_H * c.BLOCK_B
    exchange = (2 if p.tensor_cores else 4) * max(tile, c.BLOCK_K * c.BLOCK_B) * 4  # float32 between layouts
    staged = 0
    if p.kernel == "sequence_backward":
        # For each stage the reserve, the c before from either source, and the gradient and the h before.
        row = p.R * 4 + (4 + p.dtype.itemsize) * p.has_c + 3 * p.dtype.itemsize
        staged = max(c.stages - 1, 0) * row * max(tile, c.BLOCK_K * c.BLOCK_B)
    return weight_bytes(p) + exchange + staged + 1024


def registers(p: Problem, c: Config) -> int:
    """An estimate of the registers of a thread of a sequence kernel at its fullest."""
    threads = 32 * c.warps
    tiles = (2 * p.G + p.R + 3) * c.BLOCK_H * c.BLOCK_B // threads  # pre-activations twice, reserve, state
    filling = weight_bytes(p) // 4 // threads  # the weights on their way to shared memory
    if not p.tensor_cores:  # a row of each weight is an operand in registers
        return tiles + (p.G + p.projects) * c.BLOCK_K + 32
    return max(tiles, filling) + 96


def sequence_candidates(arch: int, p: Problem) -> list[Config]:
    """The configurations that fit, the likely best first."""
    here = limits(arch)
    h, k = power(p.H, 16), power(p.P, 16)
    # Rows that are not aligned cost addresses, in registers: beyond 64 units the backward spills with 16 sequences, and
    # beside tcgen05 (sm_100) the forward too.
    aligned = p.H % 16 == 0 and p.P % 16 == 0
    narrow = not aligned and h > 64 and (p.kernel == "sequence_backward" or arch >= 100)
    # 16 sequences are the least that wgmma takes; without tensor cores more would spill.
    widths = (8,) if narrow else (16, 32, 64) if p.tensor_cores else (16,)
    found = []
    for width in widths:
        # One warp group holds a tile of 1024 numbers of each gate, and its aligned addresses, without spilling.
        warps = 4 if h * width <= 1024 and aligned and p.tensor_cores else 8
        for stages in (3, 2, 1) if p.kernel == "sequence_backward" else (1,):
            c = Config(width, h, k, warps, stages)
            if shared_bytes(p, c) <= here.shared and registers(p, c) <= REGISTERS:
                found.append(c)
                break  # fewer stages only where more do not fit
    # Narrow tiles give the shortest step. Wider ones only where the narrow would queue for a multiprocessor.
    enough = [c for c in found if here.blocks >= -(-p.B // c.BLOCK_B) * p.D]
    return enough[:1] + [c for c in found[::-1] if c not in enough[:1]]


def step_candidates(arch: int, p: Problem) -> list[Config]:
    """Configurations of a step, the likely best first; every size has one."""
    here = limits(arch)
    depth = 64 if p.dtype.itemsize == 2 else 32  # 128 bytes of a row of weights
    width = min(power(p.B, 16), 64 if p.tensor_cores else 16)
    found = []
    for units in (64, 32, 16):
        if units > power(p.H, 16):
            continue
        # A gate's sums must stay in registers: 4 gates, twice where x and r are apart.
        columns = width
        while 2 * p.G * units * columns > 4 * 32 * 128:
            columns //= 2
        found.append(Config(columns, units, depth, 4, 3))
    # Weights are read once from L2 by each tile of the batch: large tiles, but enough to busy half the processors.
    blocks = {c: -(-p.H // c.BLOCK_H) * -(-p.B // c.BLOCK_B) * p.D for c in found}
    busy = [c for c in found if 2 * blocks[c] >= here.blocks]
    return busy + [c for c in found[::-1] if c not in busy]


LARGEST = 1024  # units that a persistent kernel has run with


def tiled(n: int, block: int) -> int:
    """n rounded up to whole blocks."""
    return -(-n // block) * block


def slots(p: Problem) -> int:
    """Gates, and what fills them up to a power of two, among which a persistent kernel shares out 64 rows."""
    return power(p.G)


def persistent_bytes(p: Problem, c: Config) -> int:
    """An upper bound of the shared memory of a persistent kernel, held to the compilers' figures by a test."""
    return (slots(p) * c.BLOCK_H + c.BLOCK_B) * tiled(p.H, c.BLOCK_K) * p.dtype.itemsize + 8192


def persistent_config(arch: int, processors: int, p: Problem) -> Config | None:
    """Of a persistent kernel on so many multiprocessors; None where it does not fit or nothing is known of it."""
    force = tuning_cache.force.get()
    known = 90 <= arch < 100 or force.persistent
    if force.steps or p.projects or p.dtype.itemsize != 2 or p.H > LARGEST or not known:
        return None
    for block_b in (16, 32):
        # 64 rows of weights, the least that wgmma takes, in chunks of the depth.
        c = Config(block_b, 64 // slots(p), 64, 4, 1)
        programs = tiled(p.B, block_b) // block_b * (tiled(p.H, 64) // c.BLOCK_H) * p.D
        if programs <= processors and persistent_bytes(p, c) <= limits(arch).shared:
            return c
    return None


def choose(arch: int, p: Problem) -> Config | None:
    """The configuration of a call; None where a sequence does not fit on chip."""
    whole = p.kernel.startswith("sequence")
    if whole and (tuning_cache.force.get().steps or tuning_cache.force.get().persistent):
        return None
    found = tuning_cache.preferred(p.key)
    if found is not None:
        config = Config(*found)
        same = (power(p.H, 16), power(p.P, 16)) == (config.BLOCK_H, config.BLOCK_K)
        fits = same and shared_bytes(p, config) <= limits(arch).shared  # not so where it is another GPU's
        if not whole or fits:
            return config
    candidates = (sequence_candidates if whole else step_candidates)(arch, p)
    return candidates[0] if candidates else None
