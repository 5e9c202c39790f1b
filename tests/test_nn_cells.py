"""seqkern.nn.{RNNCell,LSTMCell,GRUCell} against torch.nn's, on every backend and instruction set."""

import copy
import pickle

import pytest
import torch

import seqkern
from seqkern.testing import DTYPES, relative_rms, tolerance, worst

KINDS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]
I, H = 5, 7


def pair(kind, options, dtype=torch.float32):
    theirs = getattr(torch.nn, kind)(I, H, dtype=dtype, **options)
    ours = getattr(seqkern.nn, kind)(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves_of(kind, lead, with_state, dtype):
    states = (2 if kind == "LSTMCell" else 1) if with_state else 0
    return [torch.randn(*lead, I).to(dtype), *(torch.randn(*lead, H).to(dtype) for _ in range(states))]


def call(cell, leaves):
    x, *state = leaves
    found = cell(x, None if not state else state[0] if len(state) == 1 else tuple(state))
    return list(found) if isinstance(found, tuple) else [found]


def results(cell, leaves, dtype):
    cell = copy.deepcopy(cell).to(dtype)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
    outs = call(cell, leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outs]
    loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True))
    return [o.detach() for o in outs] + list(torch.autograd.grad(loss, [*leaves, *cell.parameters()]))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3,), (33,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_as_torch(run_on, kind, options, dtype, bias, lead, with_state):
    theirs, ours = pair(kind, {**options, "bias": bias}, dtype)
    leaves = leaves_of(kind, lead, with_state, dtype)
    exact, want = results(theirs, leaves, torch.float64), results(theirs, leaves, dtype)
    for i, (mine, other, true) in enumerate(zip(results(ours, leaves, dtype), want, exact, strict=True)):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        error, allowed = relative_rms(mine, true), tolerance(dtype, relative_rms(other, true))
        assert error <= allowed, f"result {i}: {error:.3g} > {allowed:.3g} at {worst(mine, true)}"
    with torch.no_grad():
        fast = call(ours, leaves)
    outs = results(ours, leaves, dtype)[: len(fast)]
    assert all(torch.equal(a, b) for a, b in zip(fast, outs, strict=True)), "results differ without gradients"


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_spec_is_torch_in_float64(kind, options):
    theirs, ours = pair(kind, options, torch.float64)
    leaves = leaves_of(kind, (3,), True, torch.float64)
    with seqkern.backend("reference"):
        got = results(ours, leaves, torch.float64)
    for mine, other in zip(got, results(theirs, leaves, torch.float64), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_copies_and_names(run_on, kind, options):
    theirs, ours = pair(kind, options)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    x = torch.randn(2, I)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert all(torch.equal(a, b) for a, b in zip(call(ours, [x]), call(twin, [x]), strict=True))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_computed_weights(run_on, kind, options):
    theirs, ours = pair(kind, options)
    for m in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(m, "weight_hh")
    x = torch.randn(2, I)
    for a, b in zip(call(ours, [x]), call(theirs, [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_as_torch(kind):
    theirs, ours = pair(kind, {})
    for given in (torch.randn(2, I), torch.randn(2, I).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = call(ours, [given]), call(theirs, [given])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_sizes_of_zero_as_torch(kind, sizes):
    theirs, x = getattr(torch.nn, kind)(*sizes), torch.zeros(2, sizes[0])
    ours = seqkern.nn.__dict__[kind](*sizes)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_sparse_input_without_a_state(kind):
    theirs = getattr(torch.nn, kind)(4, 6)
    ours, x = seqkern.accelerate(copy.deepcopy(theirs)), torch.eye(4).to_sparse()
    try:
        want = theirs(x)
    except RuntimeError as e:
        with pytest.raises(type(e)):
            ours(x)
    else:
        torch.testing.assert_close(ours(x), want)


@pytest.mark.parametrize(
    ("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_a_cell_state_of_a_wider_dtype(narrow, wide):
    theirs = torch.nn.LSTMCell(4, 6, dtype=narrow)
    ours = seqkern.accelerate(copy.deepcopy(theirs))
    x, h, c = torch.randn(2, 4, dtype=narrow), torch.randn(2, 6, dtype=narrow), torch.randn(2, 6, dtype=wide)
    torch.testing.assert_close(ours(x, (h, c)), theirs(x, (h, c)))
