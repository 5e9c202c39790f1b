"""The recurrent ops against a float64 oracle, on every instruction set of this machine."""

import itertools

import pytest
import torch

from seqkern import testing
from seqkern.testing import (
    DTYPES,
    Case,
    check_op,
    make_case,
    on_threads,
    oracle,
    run_op,
    run_torch,
    torch_errors,
)

pytestmark = pytest.mark.native

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FORMS = [("dense", False), ("dense", True), ("packed", False), ("packed", True), ("step", False)]

# T, B, I, H: single elements, odd sizes, a batch of one, sizes past a vector and past a cache-sized chunk.
SHAPES = [(1, 1, 1, 1), (7, 3, 5, 6), (5, 1, 17, 33), (3, 19, 8, 16), (4, 33, 40, 65), (9, 2, 64, 130)]


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_oracle_is_torch(cell, dtype, form, bidirectional):
    case = make_case(cell, form, torch.float64, bidirectional=bidirectional, proj=3 if cell == "lstm" else 0)
    want = oracle(case)
    testing.assert_close(run_torch(case), want, dict.fromkeys(want, 0.0))
    assert all(e < 0.1 for e in torch_errors(case.to(dtype), oracle(case.to(dtype))).values())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_op_meets_oracle(isa, cell, dtype, form, bidirectional, shape):
    T, B, I, H = shape
    for bias, proj in itertools.product((True, False), (0, H // 2) if cell == "lstm" and H > 1 else (0,)):
        options = {"T": T, "B": B, "I": I, "H": H, "proj": proj, "bias": bias, "bidirectional": bidirectional}
        seeds = range(16) if H == 1 else [T + H]
        cases = [make_case(cell, form, dtype, **options, seed=seed) for seed in seeds]
        check_op(*cases, what=f"{isa} {cell} {form} bias={bias} proj={proj}")


@pytest.mark.parametrize(("form", "T", "B"), [("dense", 81, 13), ("packed", 121, 13), ("dense", 71, 1)])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_op_over_many_steps(isa, cell, dtype, form, T, B):
    """More rows than a chunk of the backward scan holds; one sequence long enough for packed weights."""
    sizes = {"T": T, "B": B, "I": 9, "H": 21, "proj": 7 if cell == "lstm" else 0}
    check_op(make_case(cell, form, dtype, **sizes, bidirectional=True), what=f"{isa} {cell} {form}")


@pytest.mark.parametrize(("form", "bidirectional"), FORMS[:3])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_weight_gradients_of_wide_layers(isa, cell, form, bidirectional, dtype):
    """Rows that fill a chunk to the last, and more columns of inputs and states than stay in a cache at a time."""
    proj = 14 if cell == "lstm" else 0
    sizes = {"T": 20, "B": 32, "I": 260, "H": 28, "proj": proj, "bidirectional": bidirectional}
    case = make_case(cell, form, dtype, **sizes)
    check_op(case, what=f"{isa} {cell} {form}")
    same_for_any_thread_count(case)


def same_for_any_thread_count(case: Case):
    first, *others = on_threads(lambda: run_op(case))
    for other in others:
        assert [k for k in first if not torch.equal(first[k], other[k])] == []


# Of an LSTM's last three: packed with AVX-512, from beyond two cores' L2 in many steps, and projected.
@pytest.mark.parametrize(
    ("cell", "T", "H", "proj"),
    [
        ("gru", 71, 110, 0),
        ("rnn_tanh", 71, 190, 0),
        ("lstm", 71, 520, 0),
        ("lstm", 71, 101, 0),
        ("lstm", 130, 370, 0),
        ("lstm", 71, 130, 71),
    ],
)
def test_one_sequence_on_large_weights(isa, cell, T, H, proj):
    """Recurrent weights beyond 128 KB, packed for one sequence on some machines; 520 units fill huge pages."""
    case = make_case(cell, T=T, B=1, I=9, H=H, proj=proj)
    check_op(case, what=f"{isa} {cell} {H}")
    same_for_any_thread_count(case)


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_op_skips_what_is_not_needed(isa, cell, form, bidirectional):
    case = make_case(cell, form, bidirectional=bidirectional)
    full = run_op(case)
    for need_input, need_weights in itertools.product((True, False), repeat=2):
        part = run_op(case, need_input, need_weights)
        for name, want in full.items():
            skipped = (name == "d_input" and not need_input) or (
                name[:4] in ("d_w_", "d_b_") and not need_weights
            )
            got = part[name]
            assert got.shape == (0,) if skipped else torch.equal(got, want), name


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_op_keeps_nothing_unless_told(isa, cell, form, bidirectional):
    case = make_case(cell, form, bidirectional=bidirectional)
    saved = torch.ops.seqkern.rnn_forward(*case.tensors, cell, True)
    lean = torch.ops.seqkern.rnn_forward(*case.tensors, cell, False)
    assert all(torch.equal(a, b) for a, b in zip(saved[:3], lean[:3], strict=True))
    assert lean[3].numel() == 0


def strided(case: Case, how: str) -> Case:
    def lay(t):
        if t is None or not t.is_floating_point():
            return t
        if how == "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "gapped":
            return torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0]
        wide = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)  # "offset": no alignment
        wide[1:] = t.reshape(-1)
        return wide[1:].view(t.shape)

    return Case(case.cell, tuple(map(lay, case.tensors)), tuple(map(lay, case.grads)))


@pytest.mark.parametrize("how", ["transposed", "gapped", "offset"])
@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_op_takes_any_strides(isa, cell, form, bidirectional, how):
    case = make_case(cell, form, bidirectional=bidirectional, B=4, H=9, proj=4 if cell == "lstm" else 0)
    check_op(strided(case, how), what=f"{isa} {how}")


@pytest.mark.parametrize("cell", CELLS)
def test_op_takes_expanded_gradients(isa, cell):
    case = make_case(cell)
    grads = tuple(None if g is None else g.new_ones(()).expand(g.shape) for g in case.grads)
    check_op(Case(cell, case.tensors, grads), what=isa)


@pytest.mark.parametrize("form", ["dense", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_op_empty_batch(isa, cell, form):
    got, want = run_op(make_case(cell, form, B=0)), oracle(make_case(cell, form, B=0))
    for name, t in want.items():
        assert got[name].shape == t.shape and torch.equal(got[name].double(), t), name


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_op_is_the_same_for_any_thread_count(isa, cell, form, bidirectional):
    for T, B, I, H in [(6, 1, 20, 70), (6, 37, 20, 70), (3, 5, 300, 260)]:
        same_for_any_thread_count(make_case(cell, form, T=T, B=B, I=I, H=H, bidirectional=bidirectional))


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_op_on_far_input_weights(isa, form):
    """2 MB of them and more, which serve 512 rows at a time on some machines."""
    case = make_case("lstm", form, T=90, B=8, I=520, H=260)
    check_op(case, what=f"{isa} {form}")
    same_for_any_thread_count(case)


@pytest.mark.parametrize(("form", "bidirectional"), FORMS[:3])
def test_op_shares_out_the_units_of_far_weights(isa, form, bidirectional):
    """8 MB of them and more."""
    same_for_any_thread_count(make_case("lstm", form, T=3, B=21, I=9, H=730, bidirectional=bidirectional))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", testing.FORMS)
def test_op_nonfinite_as_torch(isa, cell, form, value):
    case = make_case(cell, form, B=5, H=9)
    input = case.tensors[0].clone()
    input[(1,) * (input.dim() - 1)] = value
    poisoned = Case(cell, (input, *case.tensors[1:]), case.grads)
    got, want = run_op(poisoned), run_torch(poisoned)
    for name in ("output", "h_n", "c_n"):
        if name in want:
            torch.testing.assert_close(got[name], want[name], equal_nan=True, rtol=1e-4, atol=1e-5)


def arguments(case: Case, grads: bool):
    return tuple(
        t.clone().requires_grad_(grads) if t is not None and t.is_floating_point() else t
        for t in case.tensors
    )


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_opcheck(cell, form, bidirectional):
    case = make_case(cell, form, bidirectional=bidirectional, proj=3 if cell == "lstm" else 0)
    torch.library.opcheck(torch.ops.seqkern.rnn_forward, (*arguments(case, True), cell, True))
    torch.library.opcheck(torch.ops.seqkern.rnn_forward, (*arguments(case, False), cell, False))


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_opcheck(cell, form, bidirectional):
    case = make_case(cell, form, bidirectional=bidirectional, proj=3 if cell == "lstm" else 0)
    output, _, _, reserve = torch.ops.seqkern.rnn_forward(*case.tensors, cell, True)
    grads = [output.new_empty(0) if g is None else g for g in case.grads]
    tensors = (*grads, output, reserve, *arguments(case, False))
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(torch.ops.seqkern.rnn_backward, (*tensors, cell, *needs))


def op_function(case: Case):
    """The op as a function of its floating-point tensors, for gradcheck, and those tensors."""
    tensors = arguments(case, True)
    slots = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

    def run(*given):
        filled = list(tensors)
        for i, t in zip(slots, given, strict=True):
            filled[i] = t
        *outs, _ = torch.ops.seqkern.rnn_forward(*filled, case.cell, True)
        return tuple(o for o in outs if o.numel())

    return run, tuple(tensors[i] for i in slots)


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])  # a rectifier has kinks
def test_op_gradcheck(isa, cell, form, bidirectional):
    case = make_case(
        cell,
        form,
        torch.float64,
        T=3,
        B=2,
        I=2,
        H=3,
        bidirectional=bidirectional,
        proj=2 if cell == "lstm" else 0,
    )
    run, inputs = op_function(case)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_op_gradgradcheck(cell, form, bidirectional):
    case = make_case(
        cell,
        form,
        torch.float64,
        T=3,
        B=2,
        I=2,
        H=3,
        bidirectional=bidirectional,
        proj=2 if cell == "lstm" else 0,
    )
    run, inputs = op_function(case)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"form": "packed"}, {"form": "step"}], ids=str
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_backward_of_a_forward_that_kept_nothing(cell, options):
    case = make_case(cell, **options)
    found = []
    for save in (True, False):
        tensors = arguments(case, True)
        output, h_n, c_n, _ = torch.ops.seqkern.rnn_forward(*tensors, cell, save)
        leaves = [t for t in tensors if t is not None and t.requires_grad]
        found.append(torch.autograd.grad(output.square().sum() + h_n.sum() + c_n.sum(), leaves))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_what_is_saved_past_the_caches_is_what_is_saved(isa, cell, dtype):
    """More than 16 MB of it; of half the batch less."""
    T, B, H = 48, 128, 192
    case = make_case(cell, "dense", dtype, T=T, B=B, I=8, H=H)
    whole = torch.ops.seqkern.rnn_forward(*case.tensors, cell, True)[3].view(T, B, -1)
    assert whole.nbytes > 16 << 20
    for part in (slice(0, B // 2), slice(B // 2, B)):
        at = {0: (slice(None), part), 2: (slice(None), part), 3: (slice(None), part)}
        tensors = [
            t if t is None or i not in at else t[at[i]].contiguous() for i, t in enumerate(case.tensors)
        ]
        got = torch.ops.seqkern.rnn_forward(*tensors, cell, True)[3].view(T, B // 2, -1)
        assert torch.equal(got, whole[:, part])
