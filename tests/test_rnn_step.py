"""A cell's step by the op that checks, chooses and computes in one call."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import seqkern
from seqkern import functional
from seqkern.testing import (
    DTYPES,
    check_op,
    make_case,
    on_threads,
    oracle,
    poison,
    relative_rms,
    tolerance,
    torch_errors,
)

pytestmark = [pytest.mark.native, pytest.mark.built]
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
MODULES = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell}
op = torch.ops.seqkern.rnn_step


def arguments(case):
    """The op's, of a case in the form of a step."""
    input, _, hx, cx, w_ih, w_hh, b_ih, b_hh, *_ = case.tensors
    return input, hx, cx, w_ih, w_hh, b_ih, b_hh, case.cell


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 6), (1, 17, 33), (19, 8, 16), (33, 40, 65), (2, 64, 130)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_step_of_the_layers_op(isa, dtype, cell, bias, shape):
    B, I, H = shape
    case = make_case(cell, "step", dtype, B=B, I=I, H=H, bias=bias)
    h, c = op(*arguments(case))
    want_h, _, want_c, _ = torch.ops.seqkern.rnn_forward(*case.tensors, cell, False)
    assert torch.equal(h, want_h)
    assert c is None if cell != "lstm" else torch.equal(c, want_c)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meets_the_oracle(isa, dtype, cell):
    case = make_case(cell, "step", dtype, B=7, I=20, H=48)
    want = oracle(case)
    errors = torch_errors(case, want)
    given = arguments(case)
    poison(given[1], given[1])
    got = op(*given)
    for name, t in zip(("output", "c_n"), got):
        assert t is None or relative_rms(t, want[name]) <= tolerance(dtype, errors[name])


@pytest.mark.parametrize("form", ["step", "dense", "packed"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_of_a_single_step(isa, dtype, cell, form):
    """Weights that are packed panel by panel, for one use each."""
    sizes = {"T": 1, "B": 131, "I": 40, "H": 65, "proj": 20 if cell == "lstm" and form != "step" else 0}
    check_op(make_case(cell, form, dtype, **sizes, bidirectional=form != "step"), what=f"{isa} {cell} {form}")


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(isa, cell):
    """Every other number of a row, every other row, columns for rows, one row for all."""
    case = make_case(cell, "step", torch.float32, B=6, I=10, H=12)
    given = arguments(case)
    want = op(*given)

    def spread(t):
        wide = t.new_full([2 * n for n in t.shape], torch.nan)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    for change in (spread, lambda t: t.mT.contiguous().mT if t.dim() == 2 else t):
        got = op(*(change(t) if isinstance(t, torch.Tensor) else t for t in given))
        assert all(torch.equal(a, b) for a, b in zip(got, want) if b is not None)
    one = op(given[0][:1].expand(6, -1), *given[1:])
    alone = op(given[0][:1].repeat(6, 1), *given[1:])
    assert torch.equal(one[0], alone[0])


@pytest.mark.parametrize("sizes", [(40, 130, 257), (64, 300, 512), (131, 40, 600)], ids=str)
def test_any_number_of_threads(sizes):
    """Rows are shared out, or units: where the weights are large and the rows not many."""
    B, I, H = sizes
    given = arguments(make_case("lstm", "step", torch.float32, B=B, I=I, H=H))
    first, *others = on_threads(lambda: op(*given))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


X, H, W, R = torch.randn(2, 3), torch.randn(2, 4), torch.randn(4, 3), torch.randn(4, 4)
BIAS = torch.randn(4)
NOT_SERVED = {
    "one row": (X[0], H[0], None, W, R, None, None),
    "a sequence": (X[None], H, None, W, R, None, None),
    "another batch": (X, H[:1], None, W, R, None, None),
    "another size of h": (X, H[:, :3], None, W, R, None, None),
    "other features": (X[:, :2], H, None, W, R, None, None),
    "gates of another cell": (X, H, None, W.repeat(3, 1), R.repeat(3, 1), None, None),
    "half of a bias": (X, H, None, W, R, BIAS, None),
    "a bias of another size": (X, H, None, W, R, BIAS, BIAS[:3]),
    "a bias of two dimensions": (X, H, None, W, R, BIAS, BIAS[:, None]),
    "mixed dtypes": (X, H.double(), None, W, R, None, None),
    "a wider bias": (X, H, None, W, R, BIAS.double(), BIAS.double()),
    "whole numbers": (X.long(), H.long(), None, W.long(), R.long(), None, None),
    "complex numbers": (X.cfloat(), H.cfloat(), None, W.cfloat(), R.cfloat(), None, None),
    "no features": (X[:, :0], H, None, W[:, :0], R, None, None),
    "no hidden units": (X, H[:, :0], None, W[:0], R[:0, :0], None, None),
    "a state too many": (X, H, H, W, R, None, None),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_it_does_not_serve(name):
    assert op(*NOT_SERVED[name], "rnn_tanh") == (None, None)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell):
    given = arguments(make_case(cell, "step", torch.float32))
    torch.library.opcheck(op.default, given)
    across = [t.mT.contiguous().mT if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in given]
    torch.library.opcheck(op.default, tuple(across))


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("cell", ["lstm_cell", "gru_cell", "rnn_cell"])
@torch.no_grad()
def test_none_for_a_tensor_is_said(cell, at):
    gates = {"lstm_cell": 4, "gru_cell": 3, "rnn_cell": 1}[cell]
    h = torch.zeros(2, 4)
    given = [torch.zeros(2, 3), (h, h) if cell == "lstm_cell" else h, torch.zeros(4 * gates, 3)]
    given += [torch.zeros(4 * gates, 4)]
    given[at] = None
    with pytest.raises((AttributeError, TypeError), match=r"NoneType|no attribute"):
        getattr(functional, cell)(*given)


def test_no_rows_are_served():
    h, c = op(X[:0], H[:0], None, W, R, None, None, "rnn_relu")
    assert h.shape == (0, 4) and c is None


@pytest.mark.parametrize("cell", MODULES)
def test_modules_go_by_it_where_nobody_looks_on(served, cell):
    module, x, h = seqkern.accelerate(MODULES[cell](3, 4)), torch.randn(2, 3), torch.randn(2, 4)
    state = (h, h) if cell == "lstm" else h

    def run():
        return module(x, state)

    def within(context):
        with torch.no_grad(), context:
            return served("_step", run)

    assert within(torch.no_grad()) == within(torch.inference_mode()) == 1
    assert served("_step", run) == 0  # a gradient
    assert within(torch.autocast("cpu", torch.bfloat16)) == 0
    assert within(seqkern.backend("reference")) == within(seqkern.backend("cpu")) == 0
    assert within(FlopCounterMode(display=False)) == 0
    assert within(torch.autograd.forward_ad.dual_level()) == 0
    with torch.no_grad():
        assert served("_step", lambda: seqkern.explain(module, x, state)) == 0
        assert served("_step", lambda: torch.func.vmap(lambda y: module(y, state)[0])(x.expand(3, 2, 3))) == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("cell", MODULES)
def test_weights_in_other_layouts_are_torchs(cell):
    """The dispatcher knows no kernel of ours for sparse weights, which torch multiplies."""
    module = MODULES[cell](3, 4).requires_grad_(False)
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    state = (h, h) if cell == "lstm" else h
    want = module(x, state)
    for name in ("weight_ih", "weight_hh"):
        setattr(module, name, nn.Parameter(getattr(module, name).to_sparse_csr(), requires_grad=False))
    got = seqkern.accelerate(module)(x, state)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
