"""The recurrent Triton kernels against a float64 oracle: in the interpreter on a CPU, or on the GPU that is here.

TRITON_INTERPRET=1 python -m pytest -m interpreter tests      python -m pytest -m gpu tests
"""

import itertools
import warnings

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern.kernels import math, rnn, tuning, tuning_cache
from seqkern.kernels.layer import Layer
from seqkern.ops import _hardware, _library
from seqkern.testing import (
    Case,
    check_drawn,
    check_op,
    make_case,
    oracle,
    relative_rms,
    run_op,
    run_torch,
    tolerance,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.interpreter,
    pytest.mark.filterwarnings(
        "ignore:RNN module weights are not part of single contiguous chunk"
    ),  # cuDNN's
    pytest.mark.filterwarnings(
        "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    ),  # Triton's
    # Infinity in a tile is what some of the tests are about.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

DEVICE = "cpu" if _hardware.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FORMS = [("dense", False), ("dense", True), ("packed", False), ("packed", True), ("step", False)]
WAYS = [(*form, steps) for form in FORMS for steps in ((False, True) if form[0] != "step" else (True,))]

# T, B, I, H: single elements, odd sizes, a batch of one, more than a tile of sequences, more than a tile of units.
SHAPES = [(1, 1, 1, 1), (5, 3, 4, 7), (3, 1, 17, 33), (1, 17, 3, 33), (2, 19, 9, 65), (2, 2, 64, 130)]


def dtype_name(dtype):
    return str(dtype)[6:]


def on_device(case):
    def move(t):
        return t.to(DEVICE) if t is not None and t.is_floating_point() else t

    return Case(case.cell, tuple(map(move, case.tensors)), tuple(map(move, case.grads)))


def make(*args, **options):
    return on_device(make_case(*args, **options))


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Forces the kernels, by the rules of tuning alone."""
    monkeypatch.setattr(tuning_cache, "measured", dict)
    with seqkern.backend("triton"):
        yield


@pytest.fixture(
    params=[(f, s) for f, d, s in WAYS if not d], ids=lambda p: f"{p[0]}-{'steps' if p[1] else 'sequence'}"
)
def form(request):
    """Each form, on each way that it can take."""
    with tuning_cache.forced({}, steps=request.param[1]):
        yield request.param[0]


def check(cell, form, bidirectional, steps, dtype, shape, bias=True, proj=0):
    T, B, I, H = shape
    options = {"T": T, "B": B, "I": I, "H": H, "bias": bias, "proj": proj, "bidirectional": bidirectional}
    seeds = range(16) if H == 1 else [T + H]  # the rounding of one element says little

    def draw(n):
        return [make(cell, form, dtype, **options, seed=seed + 100 * n) for seed in seeds]

    with tuning_cache.forced({}, steps=steps):
        check_drawn(cell, draw, f"{cell} {form} {options} steps={steps}")


@pytest.mark.parametrize(("form", "bidirectional", "steps"), WAYS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_op_meets_oracle(cell, dtype, form, bidirectional, steps):
    check(cell, form, bidirectional, steps, dtype, (3, 3, 4, 7))


# In float16 a sequence of so many units fits on chip; in float32 it would run step by step.
ODD = [(c, s, steps) for c in CELLS for s in SHAPES[2:] for steps in (False, True)]
ODD = [(c, s, steps) for c, s, steps in ODD if steps or s[3] <= 128 or c.startswith("rnn")]


@pytest.mark.parametrize(("cell", "shape", "steps"), ODD)
def test_op_meets_oracle_in_odd_sizes(cell, shape, steps):
    check(cell, "packed", shape[3] < 40, steps, torch.float32 if steps else torch.float16, shape)


@pytest.mark.parametrize(("form", "bidirectional", "steps"), WAYS)
@pytest.mark.parametrize(("bias", "proj"), [(False, 0), (True, 3), (False, 3)])
def test_lstm_projected_and_without_bias(form, bidirectional, steps, bias, proj):
    check("lstm", form, bidirectional, steps, torch.float32, (3, 2, 4, 7), bias, proj)


@pytest.mark.parametrize(("form", "bidirectional", "steps"), WAYS)
@pytest.mark.parametrize("cell", CELLS[1:])
def test_without_bias(cell, form, bidirectional, steps):
    check(cell, form, bidirectional, steps, torch.float32, (2, 2, 4, 7), bias=False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(("form", "bidirectional", "steps"), WAYS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_op_meets_oracle_in_full(cell, dtype, form, bidirectional, steps, shape):
    H = shape[3]
    for bias, proj in itertools.product((True, False), (0, H // 2) if cell == "lstm" and H > 1 else (0,)):
        check(cell, form, bidirectional, steps, dtype, shape, bias, proj)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cell=st.sampled_from(CELLS),
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from(DTYPES),
    T=st.integers(1, 4),
    B=st.integers(1, 20),
    I=st.integers(1, 9),
    H=st.integers(2, 40),
    bias=st.booleans(),
    project=st.booleans(),
)
def test_any_shape(cell, way, dtype, T, B, I, H, bias, project):
    proj = max(1, H // 3) if project and cell == "lstm" else 0
    check(cell, *way, dtype, (T, B, I, H), bias, proj)


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_any_width_of_tile(cell, width):
    """Configurations that another architecture, or a measurement, would choose."""
    case = make(cell, "packed", B=19, H=20, T=2)
    layer = Layer(case.tensors[0], case.tensors[1], case.tensors[4:], cell)
    for kernel, depth in (("sequence_", 32), ("step_", 16)):
        units = 32 if kernel == "sequence_" else 16
        config = tuning.Config(width, units, depth, 4, 2)
        keys = [layer.problem(kernel + way).key for way in ("forward", "backward")]
        with tuning_cache.forced(dict.fromkeys(keys, config), steps=kernel == "step_"):
            check_op(case, what=f"{config}")


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_op_skips_what_is_not_needed_and_repeats_itself(cell, form, bidirectional):
    case = make(cell, form, T=2, bidirectional=bidirectional)
    full = run_op(case)
    for need_input, need_weights in ((True, True), (False, True), (True, False), (False, False)):
        part = run_op(case, need_input, need_weights)
        for name, want in full.items():
            weight = name[:4] in ("d_w_", "d_b_")
            skipped = (name == "d_input" and not need_input) or (weight and not need_weights)
            assert part[name].shape == (0,) if skipped else torch.equal(part[name], want), name


@pytest.mark.parametrize("cell", CELLS)
def test_op_keeps_nothing_unless_told(form, cell):
    case = make(cell, form, T=2)
    saved = torch.ops.seqkern.rnn_forward(*case.tensors, cell, True)
    lean = torch.ops.seqkern.rnn_forward(*case.tensors, cell, False)
    assert all(torch.equal(a, b) for a, b in zip(saved[:3], lean[:3], strict=True))
    assert lean[3].numel() == 0


@pytest.mark.skipif(_library.native() is None, reason="no compiled kernels to compare with")
def test_reserve_is_laid_out_as_the_cpu_kernels_do():
    """A forward on one backend may meet a backward on the other: outside the block that forces triton, say."""
    for cell, form in itertools.product(("lstm", "gru"), ("dense", "packed")):
        case = make(cell, form, bidirectional=True)
        ours = torch.ops.seqkern.rnn_forward(*case.tensors, cell, True)[3]
        host = Case(cell, tuple(None if t is None else t.cpu() for t in case.tensors), case.grads)
        with seqkern.backend("cpu"):
            theirs = torch.ops.seqkern.rnn_forward(*host.tensors, cell, True)[3]
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def strided(case, how):
    def lay(t):
        if t is None or not t.is_floating_point():
            return t
        if how == "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "gapped":
            return torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0]
        wide = torch.full(
            (t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device
        )  # "offset": no alignment
        wide[1:] = t.reshape(-1)
        return wide[1:].view(t.shape)

    return Case(case.cell, tuple(map(lay, case.tensors)), tuple(map(lay, case.grads)))


@pytest.mark.parametrize("how", ["transposed", "gapped", "offset"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_op_takes_any_strides(form, cell, how):
    case = make(cell, form, T=2, B=4, H=9, bidirectional=form != "step", proj=4 if cell == "lstm" else 0)
    check_op(strided(case, how), what=how)


@pytest.mark.parametrize("cell", CELLS)
def test_op_takes_expanded_gradients(form, cell):
    case = make(cell, form, T=2)
    grads = tuple(None if g is None else g.new_ones(()).expand(g.shape) for g in case.grads)
    check_op(Case(cell, case.tensors, grads))


@pytest.mark.parametrize("form", ["dense", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_op_empty_batch(cell, form):
    case = make(cell, form, B=0)
    got, want = run_op(case), oracle(case)
    for name, t in want.items():
        assert got[name].shape == t.shape and torch.equal(got[name].double(), t), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("cell", CELLS)
def test_op_nonfinite_as_torch(form, cell, value):
    case = make(cell, form, T=2, B=5, H=9)
    input = case.tensors[0].clone()
    input[(1,) * (input.dim() - 1)] = value
    tensors = (input, *case.tensors[1:])
    want = run_torch(Case(cell, tensors, case.grads))
    got = dict(
        zip(("output", "h_n", "c_n"), torch.ops.seqkern.rnn_forward(*tensors, cell, False)[:3], strict=True)
    )
    for name in got.keys() & want.keys():
        torch.testing.assert_close(got[name], want[name], equal_nan=True, rtol=1e-4, atol=1e-5)


@triton.jit
def apply(p_x, p_y, f: tl.constexpr, n: tl.constexpr):
    o = tl.arange(0, n)
    tl.store(p_y + o, f(tl.load(p_x + o)))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(math.sigmoid, torch.sigmoid), (math.tanh, torch.tanh), (math.relu, torch.relu)]
)
def test_functions_over_the_whole_range(ours, theirs):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-38, 3e38, -3e38])
    sizes = torch.logspace(-30, 2.5, 4096 - 8)
    x = torch.cat((special, sizes[::2], -sizes[1::2])).to(DEVICE)
    y = torch.empty_like(x)
    apply[(1,)](x, y, ours, 4096)
    want = theirs(x.double())
    # Below 1e-37 a denormal may be flushed. A GPU's exp(x) is 2 to the rounded x log2(e): x units off in its tail.
    rtol = 1e-6 if DEVICE == "cpu" else 2e-5
    torch.testing.assert_close(y.double(), want, rtol=rtol, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("form", ["dense", "packed-unsorted"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_modules_train_as_torchs(kind, form):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    theirs = getattr(torch.nn, kind)(4, 6, **options).to(DEVICE)
    ours = getattr(seqkern.nn, kind)(4, 6, **options).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 4, device=DEVICE)
    given = (
        x if form == "dense" else pack_padded_sequence(x, [2, 4, 3], batch_first=True, enforce_sorted=False)
    )
    found = []
    for model in (ours, theirs):
        output, state = model(given)
        output = output if form == "dense" else output.data
        last = state[1] if kind == "LSTM" else state
        (output.square().sum() + last.sin().sum()).backward()
        found.append([output, last, *(p.grad for p in model.parameters())])
    for mine, other in zip(*found, strict=True):
        # cuDNN's own functions are 2e-5 off.
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 if DEVICE == "cpu" else 1e-4)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cell_modules_train_as_torchs(kind):
    theirs, ours = getattr(torch.nn, kind)(4, 6).to(DEVICE), getattr(seqkern.nn, kind)(4, 6).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, device=DEVICE)
    found = []
    for model in (ours, theirs):
        state = None
        for step in range(2):
            state = model(x * (step + 1), state)
        outs = list(state) if isinstance(state, tuple) else [state]
        sum(o.square().sum() for o in outs).backward()
        found.append([*outs, *(p.grad for p in model.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_second_derivatives_are_the_specs(cell):
    case = make(cell, T=2, B=2, I=2, H=3)

    def second(run):
        leaves = [t.clone().requires_grad_() if t is not None else None for t in case.tensors]
        (first,) = torch.autograd.grad(run(leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), [leaves[4], leaves[5]])

    got = second(lambda leaves: torch.ops.seqkern.rnn_forward(*leaves, cell, True)[0])
    with seqkern.backend("reference"):
        function = getattr(seqkern.functional, cell)
        state = (lambda t: (t[2], t[3])) if cell == "lstm" else (lambda t: t[2])
        want = second(lambda leaves: function(leaves[0], state(leaves), leaves[4:8])[0])
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_ops_are_sound():
    case = make("gru", "packed", T=2, bidirectional=True)
    leaves = tuple(
        t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in case.tensors
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.seqkern.rnn_forward, (*leaves, "gru", True), test_utils=checks)
    output, h_n, c_n, reserve = torch.ops.seqkern.rnn_forward(*case.tensors, "gru", True)
    given = (output, h_n, c_n, output, reserve, *case.tensors, "gru")
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(torch.ops.seqkern.rnn_backward, (*given, *needs), test_utils=checks)


def test_explain_names_triton():
    lstm = seqkern.nn.LSTM(3, 4).to(DEVICE)
    assert "triton" in str(seqkern.explain(lstm, torch.zeros(2, 1, 3, device=DEVICE)))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda m, x: m.double()(x.double()), "dtype is torch.float64"),
        (lambda m, x: torch.func.vmap(m)(x[None]), "transform"),
        (lambda m, x: torch.func.jvp(m, (x,), (x,)), "transform"),
    ],
)
def test_declines_with_the_reason(build, says):
    cell = seqkern.nn.GRUCell(3, 4).to(DEVICE)
    with pytest.raises(RuntimeError, match=f"'triton' was forced for gru_cell but cannot serve it: .*{says}"):
        build(cell, torch.zeros(2, 3, device=DEVICE))


def test_declines_autocast():
    cell = seqkern.nn.GRUCell(3, 4).to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast is on"):
        cell(torch.zeros(2, 3, device=DEVICE))


@pytest.mark.parametrize("steps", [False, True])
def test_step_launches_once_and_sequence_once(steps, monkeypatch):
    counted = []
    real = rnn.launch
    monkeypatch.setattr(
        rnn, "launch", lambda kernel, *rest: (counted.append(kernel.__name__), real(kernel, *rest))
    )
    T = 3
    with torch.no_grad(), tuning_cache.forced({}, steps=steps):
        seqkern.nn.LSTM(3, 4, bidirectional=True).to(DEVICE)(torch.zeros(T, 1, 3, device=DEVICE))
        seqkern.nn.LSTMCell(3, 4).to(DEVICE)(torch.zeros(1, 3, device=DEVICE))
    assert counted == (["step_forward"] * T if steps else ["sequence_forward"]) + ["step_forward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_longer_sequences_keep_the_accuracy(kind, dtype):
    theirs = getattr(torch.nn, kind)(8, 16).to(DEVICE, dtype)
    ours = getattr(seqkern.nn, kind)(8, 16).to(DEVICE, dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(60, 2, 8, device=DEVICE).to(dtype)
    with torch.no_grad(), warnings.catch_warnings():
        got, other = ours(x)[0], theirs(x)[0]
        want = theirs.double()(x.double())[0]
    assert relative_rms(got, want) <= tolerance(dtype, relative_rms(other, want))
