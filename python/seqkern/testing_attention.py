"""What the tests of attention measure with, beside `seqkern.testing`: options, random cases, a float64 oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqkern.ops.attention import GRADIENTS, NEEDS
from seqkern.spec import attention as spec
from seqkern.spec.attention import Options, Tensors
from seqkern.testing import assert_close, poison, relative_rms

# Which of the four sizes (B, Hq, L, S) a mask or bias has in full.
SHAPES = {"full": "BHLS", "heads shared": "B1LS", "batch shared": "1HLS", "keys": "B11S", "queries": "1HL1"}

# One option each, then pairs and crowds that meet in the same lines of a kernel.
OPTIONS: dict[str, dict] = {
    "plain": {},
    "causal": {"causal": "top-left"},
    "causal bottom-right": {"causal": "bottom-right"},
    "window": {"window": (3, 2)},
    "window left, causal": {"window": (4, -1), "causal": "bottom-right"},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": 1},
    "alibi of each batch": {"alibi": 2, "causal": "top-left"},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    **{f"mask, {shape}": {"mask": shape} for shape in SHAPES},
    **{f"bias, {shape}": {"bias": shape} for shape in SHAPES},
    "mask and bias": {"mask": "heads shared", "bias": "batch shared", "causal": "top-left"},
    "sinks in a window": {"sinks": True, "window": (2, 0), "mask": "full"},
    "softcap and bias": {"softcap": 2.0, "bias": "full", "sinks": True},
    "everything": {
        "mask": "heads shared",
        "bias": "full",
        "causal": "bottom-right",
        "window": (6, -1),
        "softcap": 2.0,
        "alibi": 2,
        "sinks": True,
        "dropout_p": 0.2,
    },
}

# Of several blocks along both axes, wholly visible, partly visible and skipped.
BANDS: dict[str, dict] = {
    "causal": {"causal": "top-left"},
    "bottom-right": {"causal": "bottom-right"},
    "window": {"window": (40, 10)},
    "narrow window": {"window": (5, 0)},
    "left of causal": {"window": (50, -1), "causal": "top-left"},
    "window to the right": {"window": (-1, 35)},
    "far window": {"window": (2**40, 2**40)},
}
PACKED = ((2, 3), (0, 2), (3, 0), (4, 5))  # lengths of queries and keys
LAYOUTS = ("heads last", "rows last", "gapped", "expanded", "offset")


def laid_out(x: Tensor, how: str) -> Tensor:
    """A 4-D tensor in one of `LAYOUTS`, of the same values; "expanded" repeats the first of the batch."""
    if how == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "rows last":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "gapped":
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    if how == "expanded":
        return x[:1].expand(x.shape)
    wide = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)  # "offset": no alignment
    wide[1:] = x.reshape(-1)
    return wide[1:].view(x.shape)


def draw_options(draw: Callable, st, reach: int) -> dict:
    """Options of `make_case` from hypothesis' strategies ``st``; windows of up to ``reach`` keys to a side."""
    side, shape = st.integers(-1, reach), st.sampled_from(["", *SHAPES])
    return {
        "mask": draw(shape),
        "bias": draw(shape),
        "causal": draw(st.sampled_from(["", "top-left", "bottom-right"])),
        "window": draw(st.tuples(side, side)),
        "softcap": draw(st.sampled_from([0.0, 1.0])),
        "alibi": draw(st.integers(0, 2)),
        "sinks": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.0, 0.4])),
    }


@dataclass(frozen=True)
class Case:
    """A call and the gradients to send back through output and lse."""

    tensors: Tensors
    options: Options
    grads: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype) -> "Case":
        """Query, key, value and what belongs to the scores in a dtype; lse's gradient is at least float32."""

        def cast(x: Tensor | None) -> Tensor | None:
            return x.to(dtype) if x is not None and x.is_floating_point() else x

        output, lse = self.grads
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = Tensors(*map(cast, self.tensors))  # type: ignore[arg-type]
        return replace(self, tensors=tensors, grads=(output.to(dtype), lse.to(wide)))

    def on(self, device: str) -> "Case":
        tensors = Tensors(*(None if x is None else x.to(device) for x in self.tensors))  # type: ignore[arg-type]
        return replace(self, tensors=tensors, grads=tuple(g.to(device) for g in self.grads))


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    L: int = 5,
    S: int = 7,
    D: int = 8,
    Dv: int = 0,
    lengths: tuple[tuple[int, int], ...] = (),
    mask: str = "",
    bias: str = "",
    causal: str = "",
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi: int = 0,
    sinks: bool = False,
    dropout_p: float = 0.0,
    weights: str = "",
    seed: int = 0,
) -> Case:
    """A random call.

    ``lengths`` holds (queries, keys) of each packed sequence, in place of B, L and S; ``alibi`` is the rank of the
    slopes; a mask hides a third of the weights, all keys of one query and one key of all queries.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    Dv = Dv or D
    cu = [None, None]
    if lengths:
        B, L, S = len(lengths), max(a for a, _ in lengths), max(b for _, b in lengths)
        cu = [
            torch.tensor([0, *side], dtype=torch.int32).cumsum(0, dtype=torch.int32) for side in zip(*lengths)
        ]
        rows, columns = int(cu[0][-1]), int(cu[1][-1])
        shapes = [(rows, Hq, D), (columns, Hkv, D), (columns, Hkv, Dv), (rows, Hq, Dv), (Hq, rows)]
    else:
        shapes = [(B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, Hq, L, Dv), (B, Hq, L)]
    query, key, value, grad_output, grad_lse = (normal(*shape) for shape in shapes)

    def extent(shape: str) -> list[int]:
        return [1 if letter == "1" else n for letter, n in zip(SHAPES[shape], (B, Hq, L, S))]

    shown = None
    if mask:
        shown = torch.rand(extent(mask), generator=generator) > 1 / 3
        if shown.shape[2] > 1:
            shown[:, :, -1] = False
        if shown.shape[3] > 1:
            shown[..., -1] = False
    tensors = Tensors(
        query,
        key,
        value,
        shown,
        normal(*extent(bias)) if bias else None,
        normal(*[Hq] if alibi == 1 else [B, Hq]).abs() / 4 if alibi else None,
        normal(Hq) if sinks else None,
        torch.tensor([0x123456789ABCDEF + seed]) if dropout_p else None,
        *cu,
    )
    left, right = window
    options = Options(
        D**-0.5,
        softcap,
        dropout_p,
        left,
        0 if causal else right,
        causal != "top-left",
        L if lengths else 0,
        S if lengths else 0,
        weights,
    )
    return Case(
        tensors,
        options,
        (grad_output, grad_lse.to(torch.float64 if dtype == torch.float64 else torch.float32)),
    )


def keywords(case: Case) -> dict:
    """The options of a case, as the keywords of `seqkern.functional.attention`."""
    t, o = case.tensors, case.options
    causal = "bottom-right" if o.window_right == 0 and o.bottom_right else o.window_right == 0
    return {
        "mask": t.mask,
        "bias": t.bias,
        "causal": causal,
        "window": tuple(None if side < 0 else side for side in (o.window_left, o.window_right)),
        "softcap": o.softcap,
        "alibi_slopes": t.alibi_slopes,
        "sinks": t.sinks,
        "dropout_p": o.dropout_p,
        "dropout_seed": t.seed,
        "scale": o.scale,
        "cu_seqlens_q": t.cu_seqlens_q,
        "cu_seqlens_k": t.cu_seqlens_k,
    }


def _named(output: Tensor, lse: Tensor, weights: Tensor | None, gradients) -> dict[str, Tensor]:
    found = {"output": output, "weights": weights} | {f"d_{name}": d for name, d in zip(GRADIENTS, gradients)}
    # -inf stands for an empty row and has no relative error; which rows are empty is compared as numbers
    found |= {"lse": torch.where(lse == -torch.inf, 0.0, lse), "empty": (lse == -torch.inf).to(lse.dtype)}
    return {name: x.detach() for name, x in found.items() if x is not None and x.numel()}


def oracle(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Output, lse and every gradient of the case by the spec, in float64."""
    wide = case.to(dtype)
    arguments = (*wide.tensors, *wide.options)
    return _named(*spec.attention(*arguments), spec.attention_backward((*wide.grads, None), *arguments))


def run(
    case: Case,
    forward: Callable = torch.ops.seqkern.attention,
    backward: Callable = torch.ops.seqkern.attention_backward,
) -> dict[str, Tensor]:
    """Output, lse and every gradient by functions with the ops' arguments, output memory poisoned first."""
    arguments = (*case.tensors, *case.options)
    poison(case.grads[0].transpose(-2, -3), case.grads[1])
    output, lse, weights = forward(*arguments)
    poison(*case.tensors)
    gradients = backward(*case.grads, None, output, lse, *arguments, *((True,) * len(NEEDS)))
    return _named(output, lse, weights, gradients)


def _as_fused(case: Case) -> Case:
    """The case with what a fused backward loses to rounding, as errors of the gradients that it is given.

    It makes the weights again from the lse that was computed in the case's dtype, which scales a row and all that
    follows from it; and it takes a row's sum(p dp) = output . grad_output from the output that was, added up in
    float32, which is an error of the gradient of lse.
    """
    wide, kept = case.to(torch.float64), case.grads[1].dtype
    output, lse, _ = spec.attention(*wide.tensors, *wide.options)
    output_given, lse_given, _ = spec.attention(*case.tensors, *case.options)
    terms = output_given.to(kept) * case.grads[0].to(kept)
    lost = terms.cumsum(dim=-1)[..., -1] - (output * wide.grads[0]).sum(dim=-1)
    scaled = torch.exp(torch.where(lse == -torch.inf, 0.0, lse - lse_given))
    if case.tensors.cu_seqlens_q is not None:
        lost, per_row = lost.T, scaled.T
    else:
        per_row = scaled
    return replace(wide, grads=(wide.grads[0] * per_row[..., None], (wide.grads[1] - lost) * scaled))


def check(cases: Case | Sequence[Case], *functions: Callable, what: str = "", slack: float = 1.0) -> None:
    """`run` against `oracle`, within `seqkern.testing.tolerance`.

    torch's error is that of plain torch operations in the case's dtype: the spec, which rounds as torch's own unfused
    path does; or, where it is larger, that of the sums of a fused backward (of one key they cancel wholly, and the
    unfused path is exact by luck). Several cases of one shape count as one sample: a gradient
    of a few numbers, each a sum that cancels, says little alone.
    """
    cases = [cases] if isinstance(cases, Case) else cases
    dtype = cases[0].tensors.query.dtype

    def joined(measure: Callable[[Case], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = [measure(case) for case in cases]
        return {name: torch.stack([f[name] for f in found]) for name in found[0]}

    want, rounded = joined(oracle), joined(lambda case: oracle(case, dtype))
    fused = joined(lambda case: oracle(_as_fused(case)))
    errors = {name: slack * max(relative_rms(x[name], want[name]) for x in (rounded, fused)) for name in want}
    assert_close(joined(lambda case: run(case, *functions)), want, errors, what)
