"""What the tests measure with: random cases of the ops, a float64 oracle, torch's own error, tolerances, poison.

The rule for every op, dtype and shape: the relative root-mean-square error against float64 is at most twice torch's
own error on the same inputs plus four units of rounding of the dtype (64 of float64).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from seqkern.ops import rnn as rnn_op
from seqkern.spec import CELLS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMS = ("dense", "packed", "step")
Tensors = tuple[Tensor | None, ...]
T = TypeVar("T")


@contextmanager
def without_torchs_warnings() -> Iterator[None]:
    """Keeps to itself what torch's own layers warn of on shapes that they serve slowly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield


def tolerance(dtype: torch.dtype, torch_error: float, layers: int = 1) -> float:
    """The largest relative-RMS error that is allowed where torch's own is ``torch_error``, for so many ops in a row.

    float64 is measured by float64, in which torch and the spec round alike; 64 units stand for what they share.
    """
    units = 64 if dtype == torch.float64 else 4
    return 2 * torch_error + layers * units * torch.finfo(dtype).eps


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want over that of want (over 1 where want is zero); NaN where either has one."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    scale = want.square().mean().sqrt().item()
    return ((got - want).square().mean().sqrt() / (scale or 1.0)).item()


def worst(got: Tensor, want: Tensor) -> str:
    """Where the two differ most, for a message."""
    if want.numel() == 0:
        return "no elements"
    gap = (got.detach().double() - want.detach().double()).abs().nan_to_num(nan=float("inf"))
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return f"{at}: got {got[at].item():.9g}, want {want[at].item():.9g}"


def poison(*tensors: Tensor | None) -> None:
    """Leaves NaN in the allocator's freed blocks of these tensors' sizes, so that an output never written shows."""
    for _ in range(3):
        held = [torch.full_like(t, torch.nan) for t in tensors if t is not None and t.is_floating_point()]
        del held


def on_threads(run: Callable[[], T], counts: Sequence[int] = (1, 2, 3, 5)) -> list[T]:
    """What ``run`` gives with each number of torch's threads."""
    threads, found = torch.get_num_threads(), []
    try:
        for n in counts:
            torch.set_num_threads(n)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    return found


def assert_close(
    got: dict[str, Tensor], want: dict[str, Tensor], errors: dict[str, float], what: str = ""
) -> None:
    """Every tensor in ``want`` (float64) is met by ``got`` within `tolerance` of torch's ``errors``."""
    assert got.keys() == want.keys(), f"{what}: got {sorted(got)}, want {sorted(want)}"
    bad = []
    for name, reference in want.items():
        assert got[name].shape == reference.shape, (
            f"{what}: {name} is {got[name].shape}, want {reference.shape}"
        )
        error, allowed = relative_rms(got[name], reference), tolerance(got[name].dtype, errors[name])
        if not error <= allowed:  # NaN fails
            bad.append(f"{name}: {error:.3g} > {allowed:.3g} at {worst(got[name], reference)}")
    assert not bad, f"{what}\n  " + "\n  ".join(bad)


@dataclass(frozen=True)
class Case:
    """Arguments of ``seqkern::rnn_forward`` (in its order) and the gradients to send back."""

    cell: str
    tensors: Tensors
    grads: Tensors  # of output, h_n, c_n; None where the op returns a [0] tensor

    def to(self, dtype: torch.dtype) -> "Case":
        def cast(t: Tensor | None) -> Tensor | None:
            return t.to(dtype) if t is not None and t.is_floating_point() else t

        return replace(self, tensors=tuple(map(cast, self.tensors)), grads=tuple(map(cast, self.grads)))

    @property
    def named(self) -> dict[str, Tensor | None]:
        return dict(zip(rnn_op.TENSORS, self.tensors, strict=True))


def make_case(
    cell: str,
    form: str = "dense",
    dtype: torch.dtype = torch.float32,
    *,
    T: int = 5,
    B: int = 3,
    I: int = 4,
    H: int = 6,
    proj: int = 0,
    bidirectional: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """A random case; weights are drawn as torch.nn draws them, packed lengths between 1 and T."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        draw = torch.rand(shape, generator=generator, dtype=torch.float64)
        return ((2 * draw - 1) * H**-0.5).to(dtype)

    directions, P, G = 1 + bidirectional, proj or H, CELLS[cell].gates
    batch_sizes, rows = None, [T, B]
    if form == "packed":
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[0] = T
        batch_sizes = (lengths > torch.arange(T)[:, None]).sum(1)
        rows = [int(batch_sizes.sum())]
    elif form == "step":
        assert directions == 1, "a step has no direction"
        rows = [B]
    lead = [] if form == "step" else [directions]
    weights: list[Tensor | None] = []
    for d in range(2):
        here = d < directions
        weights += [
            uniform(G * H, I) if here else None,
            uniform(G * H, P) if here else None,
            uniform(G * H) if here and bias else None,
            uniform(G * H) if here and bias else None,
            uniform(P, H) if here and proj else None,
        ]
    is_lstm = cell == "lstm"
    cx = normal(*lead, B, H) if is_lstm else None
    tensors = (normal(*rows, I), batch_sizes, normal(*lead, B, P), cx, *weights)
    grads = (
        normal(*rows, directions * P),
        normal(*lead, B, P) if form != "step" else None,
        normal(*lead, B, H) if is_lstm else None,
    )
    return Case(cell, tensors, grads)


def _named(outs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    names = ["output", "h_n", "c_n", *(f"d_{name}" for name in rnn_op.GRADIENTS)]
    pairs = zip(names, (*outs, *grads), strict=True)
    return {name: t.detach() for name, t in pairs if t is not None}


def oracle(case: Case) -> dict[str, Tensor]:
    """Outputs and every gradient of the case by the spec in float64."""
    wide = case.to(torch.float64)
    leaves = tuple(
        t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in wide.tensors
    )
    outs = rnn_op.run_spec(leaves, case.cell)
    return _named(outs, rnn_op.spec_vjp(wide.grads, leaves, case.cell, create_graph=False))


def run_op(case: Case, need_input: bool = True, need_weights: bool = True) -> dict[str, Tensor]:
    """Outputs and gradients of the case by the compiled op, absent ones left out, output memory poisoned first."""
    poison(case.grads[0], case.grads[1], case.grads[2])
    *outs, reserve = torch.ops.seqkern.rnn_forward(*case.tensors, case.cell, True)
    like = [g if g is not None else outs[0].new_empty(0) for g in case.grads]
    poison(*case.tensors)
    grads = torch.ops.seqkern.rnn_backward(
        *like, outs[0], reserve, *case.tensors, case.cell, need_input, need_weights
    )
    present = [t if t.numel() or g is not None else None for t, g in zip(outs, case.grads, strict=True)]
    inputs = [case.named[name] for name in rnn_op.GRADIENTS]
    return _named(present, [g if t is not None else None for g, t in zip(grads, inputs, strict=True)])


def run_torch(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of the case by torch's own layer, in the case's dtype."""
    leaves = [
        # cuDNN takes dense tensors alone; seqkern takes any.
        t.clone(memory_format=torch.contiguous_format).requires_grad_()
        if t is not None and t.is_floating_point()
        else t
        for t in case.tensors
    ]
    input, batch_sizes, hx, cx, *weights = leaves
    assert input is not None and hx is not None
    flat = [w for w in weights if w is not None]
    step = rnn_op.is_step(input, batch_sizes)
    if step:
        hx, cx = hx[None], cx if cx is None else cx[None]
    state = hx if cx is None else (hx, cx)
    options = (flat, weights[2] is not None, 1, 0.0, True, weights[5] is not None)
    layer = getattr(torch._VF, case.cell)  # type: ignore[attr-defined]
    if batch_sizes is None:
        outs = layer(input[None] if step else input, state, *options, False)
    else:
        outs = layer(input, batch_sizes, state, *options)
    outs = [*outs, None][:3]
    if step:
        outs = [outs[0][0], None, outs[2] if outs[2] is None else outs[2][0]]
    pairs = [
        (o, g.contiguous()) for o, g in zip(outs, case.grads, strict=True) if o is not None and g is not None
    ]
    wanted = [t for t in leaves if t is not None and t.is_floating_point()]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
    grads = [None if t is None else next(found) for t, name in _gradients(leaves)]
    return _named(outs, grads)


def _gradients(tensors: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, str]]:
    pairs = zip(tensors, rnn_op.TENSORS, strict=True)
    return ((t, name) for t, name in pairs if name != "batch_sizes")


def torch_errors(case: Case, want: dict[str, Tensor]) -> dict[str, float]:
    """torch's own relative-RMS errors on the case; 0 where its result is not finite."""
    return _errors(run_torch(case), want)


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    return {name: error if error == error else 0.0 for name, error in errors.items()}


def check_drawn(cell: str, draw: Callable[[int], Sequence[Case]], what: str = "", draws: int = 8) -> None:
    """`check_op` of the cases that ``draw`` makes of a number.

    Of an rnn_relu one of several draws must be right in its gradients, and each in its output: a sum that is 0 but for
    rounding falls on either side of relu's bend, and its unit's gradients with it.
    """
    last = draws - 1 if cell == "rnn_relu" else 0
    for n in range(last + 1):
        try:
            return check_op(*draw(n), what=what)
        except AssertionError as e:
            if n == last or "output" in str(e):
                raise
    return None


def check_op(*cases: Case, what: str = "") -> None:
    """The compiled op against the oracle, within the tolerance that torch's own error sets.

    Several cases of one shape count as one sample: a single rounding of a single element says little.
    """
    got, want, theirs = ([run(case) for case in cases] for run in (run_op, oracle, run_torch))

    def joined(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return found[0] if len(found) == 1 else {k: torch.stack([f[k] for f in found]) for k in found[0]}

    wide = joined(want)
    assert_close(joined(got), wide, _errors(joined(theirs), wide), what)
