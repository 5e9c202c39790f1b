"""Rows more than 2^31 elements apart, by calling the kernels on the first tile of a very large batch.

The tensors are views of sparse files, of which only the few pages that a tile touches exist.
"""

import pytest
import torch

from seqkern.kernels import scan, step
from seqkern.kernels.cells import CELLS

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings(
        "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    ),  # Triton's
]

T, H, LIVE = 2, 16, 16  # a tile of sequences, and of units


class Memory:
    """Tensors [rows, ...] of which every B-th block of LIVE rows is used: small ones, and the same far apart."""

    def __init__(self, folder, B):
        self.folder, self.B, self.count = folder, B, 0

    def spread(self, small, blocks):
        """A tensor of blocks * B rows with the blocks of ``small`` at its multiples of B."""
        shape = (blocks * self.B, *small.shape[1:])
        self.count += 1
        path = self.folder / str(self.count)
        elements = shape[0] * small[0].numel()
        storage = torch.UntypedStorage.from_file(str(path), True, elements * small.element_size())
        path.unlink()  # the mapping keeps it
        large = torch.empty(0, dtype=small.dtype).set_(storage, 0, shape)
        for i in range(blocks):
            large[i * self.B : i * self.B + LIVE] = small[i * LIVE : (i + 1) * LIVE]
        return large

    def gather(self, large, blocks):
        return torch.cat([large[i * self.B : i * self.B + LIVE] for i in range(blocks)])


class Near:
    """The same interface for tensors that are just as large as they need to be."""

    B = LIVE

    def spread(self, small, blocks):
        return small.clone()

    def gather(self, large, blocks):
        return large


def run(cell, memory, backward, whole):
    """What a kernel, or a launch of it for each step, writes for the first tile."""
    c, generator = CELLS[cell], torch.Generator().manual_seed(0)
    W = c.G * H

    def normal(*shape, dtype=torch.float16):
        return torch.randn(shape, generator=generator).to(dtype)

    def rows(width, dtype=torch.float16):
        return memory.spread(normal(T * LIVE, width, dtype=dtype), T)

    def states(dtype=torch.float16):
        return memory.spread(normal(LIVE, H, dtype=dtype), 1)

    wide = torch.float32
    x, w, b, h, out = rows(W), normal(c.G, H, H), normal(W), states(), rows(H)
    state = states(wide) if c.HAS_C or (c.APART and not whole) else None
    reserve = rows(c.R * H, wide) if c.R else None
    sizes = {"T": T, "B": memory.B, "H": H}
    constants = {"G": c.G, "R": c.R, "APART": c.APART, "HAS_C": c.HAS_C, "PRECISION": "ieee"}
    constants |= {"BLOCK_B": LIVE, "BLOCK_H": H, "BLOCK_P" if whole else "BLOCK_K": H}
    shared = {"p_h": h, "p_reserve": reserve, "p_starts": None, **sizes, **constants}
    if not backward:
        given = {"p_x": x, "p_w": w, "p_b": b, "p_c": state, "p_out": out, "FWD": c.fwd, "P": H, **shared}
        if whole:
            scan.sequence_forward[(1, 1)](p_whr=None, **given)
        else:
            more = {"p_wih": None, "p_bih": None, "p_c_new": state, "p_h_new": states(), "I": 1}
            for k in range(T):
                step.step_forward[(1, 1, 1)](k=k, **more, **given)
        written = [(out, T), (reserve, T), (state, 1)]
    else:
        dh, dc, dx = states(wide), states(wide) if c.HAS_C else None, rows(W)
        dr = rows(W) if c.APART else None
        first = states() if c.HAS_C else None
        given = {"p_g": rows(H), "p_c": first, "p_out": out, "p_dh": dh, "p_dc": dc, "p_dx": dx, "p_dr": dr}
        given |= {"BWD": c.bwd, **shared}
        if whole:
            scan.sequence_backward[(1, 1)](p_w=w, p_whr=None, P=H, **given)
        else:
            for k in range(T):
                step.step_backward[(1, 1, 1)](p_m=w, p_v=dx if dr is None else dr, k=k, K=W, **given)
        written = [(dx, T), (dr, T), (dh, 1), (dc, 1)]
    return [memory.gather(t, blocks) for t, blocks in written if t is not None]


@pytest.mark.parametrize("whole", [True, False], ids=["sequence", "steps"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_far_rows(cell, backward, whole, tmp_path):
    B = 1 + 2**31 // H  # so that the second row of every tensor lies past 2^31 elements
    far, near = run(cell, Memory(tmp_path, B), backward, whole), run(cell, Near(), backward, whole)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
    assert any(t.any() for t in near)
