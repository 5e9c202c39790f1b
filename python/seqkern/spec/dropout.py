"""Which attention weights dropout keeps: a counter-based generator, so that nothing has to be stored.

Philox4x32 with ten rounds (Salmon, Moraes, Dror and Shaw 2011, doi:10.1145/2063384.2063405). Query i and key j of head
h in batch b read lane j % 4 of the block with counter (b, h, i, j // 4) and the 64 bits of the seed as key, whatever
backend or tile computes them. The upper 24 bits of the lane, a whole number below 2^24, keep the weight if they are not
below p * 2^24.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
BITS = 24


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a * b. int64 wraps, which leaves the 64 bits of the unsigned product."""
    full = b * a
    return (full >> 32) & _LOW, full & _LOW


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for each counter of four words, all held in int64."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high_0, low_0 = _product(_MULTIPLIERS[0], c0)
        high_1, low_1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """The smallest 24-bit number that keeps a weight; 2^24, which none reaches, for p = 1."""
    return round(p * 2**BITS)


def kept(seed: Tensor, p: float, batch: Tensor, heads: int, L: int, S: int) -> Tensor:
    """Whether dropout keeps each weight: batch [B] -> [B, heads, L, S]."""
    device = seed.device
    seed = seed.reshape(())

    def axis(n: int, place: int) -> Tensor:
        return torch.arange(n, device=device).view([-1 if d == place else 1 for d in range(4)])

    counter = (batch.view(-1, 1, 1, 1), axis(heads, 1), axis(L, 2), axis((S + 3) // 4, 3))
    words = philox((seed & _LOW, (seed >> 32) & _LOW), tuple(torch.broadcast_tensors(*counter)))
    lanes = torch.stack(words, dim=-1).flatten(-2)[..., :S]
    return lanes >> (32 - BITS) >= threshold(p)
