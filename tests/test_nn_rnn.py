"""seqkern.nn.{RNN,LSTM,GRU} against torch.nn's, on every backend and instruction set."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import seqkern
from seqkern.ops import _linear_backends
from seqkern.testing import relative_rms, tolerance, worst

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN"
)  # torch's

KINDS = [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "bias": False},
    {"batch_first": True, "num_layers": 2},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]
PROJECTED = [{"proj_size": 3, **o} for o in OPTIONS]
CONFIGS = [(kind, {**k, **o}) for kind, k in KINDS for o in OPTIONS] + [("LSTM", o) for o in PROJECTED]
FORMS = ["dense", "unbatched", "packed", "packed-unsorted", "empty"]
STATES = [False, True]
I, H, B, T = 5, 7, 3, 6


def label(config):
    kind, options = config
    return kind + "".join(f"-{k}={v}" for k, v in options.items())


def pair(kind, options, dtype=torch.float32):
    """torch's module, and ours with the same weights."""
    theirs = getattr(torch.nn, kind)(I, H, dtype=dtype, **options)
    ours = getattr(seqkern.nn, kind)(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def arguments(module, form, with_state, dtype=torch.float32):
    """input and hx as a function of leaves, and the leaves."""
    batch = {"empty": 0}.get(form, B)
    x = torch.randn(
        *((T, I) if form == "unbatched" else (batch, T, I) if module.batch_first else (T, batch, I))
    )
    sets = module.num_layers * (2 if module.bidirectional else 1)
    lead = (sets,) if form == "unbatched" else (sets, batch)
    sizes = [module.proj_size or H] + ([H] if module.mode == "LSTM" else [])
    leaves = [x.to(dtype)] + [torch.randn(*lead, s).to(dtype) for s in sizes if with_state]

    def build(leaves):
        x, *state = leaves
        if form.startswith("packed"):
            lengths = [T, 2, 1] if form == "packed" else [2, T, 3]
            x = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=form == "packed")
        return x, None if not state else state[0] if len(sizes) == 1 else tuple(state)

    return build, leaves


def tensors(found):
    """The floating-point tensors in what a module returns."""
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, torch.Tensor) else [t for each in found for t in tensors(each)]


def results(module, build, leaves, dtype=None):
    """Outputs and all gradients of a loss that weighs every element differently, in ``dtype``."""
    dtype = dtype or leaves[0].dtype
    module = copy.deepcopy(module).to(dtype)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
    outs = tensors(module(*build(leaves)))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outs]
    wanted = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights, strict=True)), wanted)
    return [o.detach() for o in outs] + list(grads)


def assert_as_good(got, theirs, exact, what="", layers=1):
    """Shapes and dtypes of torch's results, and an error against float64 within the tolerance torch's sets."""
    assert len(got) == len(theirs) == len(exact)
    for i, (mine, other, true) in enumerate(zip(got, theirs, exact, strict=True)):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), f"{what} result {i}"
        error, allowed = relative_rms(mine, true), tolerance(mine.dtype, relative_rms(other, true), layers)
        assert error <= allowed, f"{what} result {i}: {error:.3g} > {allowed:.3g} at {worst(mine, true)}"


@pytest.mark.parametrize("with_state", STATES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_as_torch(run_on, config, form, with_state):
    theirs, ours = pair(*config)
    build, leaves = arguments(ours, form, with_state)
    exact = results(theirs, build, leaves, torch.float64)
    layers = config[1].get("num_layers", 1)
    assert_as_good(results(ours, build, leaves), results(theirs, build, leaves), exact, label(config), layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["dense", "packed-unsorted"])
@pytest.mark.parametrize(
    "config", [(k, {**o, "num_layers": 2, "bidirectional": True}) for k, o in KINDS], ids=label
)
def test_dtypes_as_torch(run_on, config, form, dtype):
    theirs, ours = pair(*config, dtype)
    build, leaves = arguments(ours, form, True, dtype)
    exact = results(theirs, build, leaves, torch.float64)
    found, other = results(ours, build, leaves), results(theirs, build, leaves)
    # A rounding that carries a rectifier over its kink turns its gradient on or off: outputs alone compare then.
    crossed = ours.mode == "RNN_RELU" and bool(((found[0] > 0) != (exact[0] > 0)).any())
    compared = slice(2) if crossed else slice(None)
    assert_as_good(found[compared], other[compared], exact[compared], label(config))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_spec_is_torch_in_float64(config, form):
    theirs, ours = pair(*config, torch.float64)
    build, leaves = arguments(ours, form, True, torch.float64)
    with seqkern.backend("reference"):
        got = results(ours, build, leaves)
    for mine, other in zip(got, results(theirs, build, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_dropout_draws_the_mask_of_torch(run_on, kind, options, form):
    theirs, ours = pair(kind, {**options, "num_layers": 3, "dropout": 0.4})
    build, leaves = arguments(ours, form, True)
    torch.manual_seed(7)
    want = tensors(theirs(*build(leaves)))
    torch.manual_seed(7)
    got = tensors(ours(*build(leaves)))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        a, b = (tensors(ours.eval()(*build(leaves)))[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_eval_mode_trains_too(run_on, config):
    theirs, ours = pair(*config)
    build, leaves = arguments(ours, "dense", False)
    exact = results(theirs, build, leaves, torch.float64)
    assert_as_good(results(ours.eval(), build, leaves), results(theirs.eval(), build, leaves), exact)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_without_gradients(run_on, config, mode):
    theirs, ours = pair(*config)
    for form in FORMS:
        build, leaves = arguments(ours, form, True)
        with mode():
            got, want = tensors(ours(*build(leaves))), tensors(theirs(*build(leaves)))
        for mine, other in zip(got, want, strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_parts_that_need_no_gradient(run_on, kind, options):
    """Frozen weights, a frozen input, one state that needs a gradient and one that does not."""
    theirs, ours = pair(kind, {**options, "num_layers": 2})
    for frozen_weights in (True, False):
        for m in (theirs, ours):
            m.requires_grad_(not frozen_weights)
        for which in range(3 if kind == "LSTM" else 2):
            build, leaves = arguments(ours, "dense", True)
            leaves[which].requires_grad_()
            wanted = [leaves[which]]
            (mine,) = torch.autograd.grad(ours(*build(leaves))[0].square().sum(), wanted)
            (other,) = torch.autograd.grad(theirs(*build(leaves))[0].square().sum(), wanted)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_nothing_given_is_written(run_on, kind, options):
    _, ours = pair(kind, {**options, "num_layers": 2, "bidirectional": True})
    build, leaves = arguments(ours, "packed-unsorted", True)
    before = [t.clone() for t in (*leaves, *ours.parameters())]
    given = [t.requires_grad_() for t in leaves]
    tensors(ours(*build(given)))[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, *ours.parameters()), strict=True))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_hidden_state_feeds_the_next_call(run_on, kind, options):
    """Truncated backpropagation: a sequence in two halves is the sequence."""
    _, ours = pair(kind, {**options, "num_layers": 2})
    x = torch.randn(T, B, I)
    whole, last = ours(x)
    first, state = ours(x[:2])
    second, end = ours(x[2:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=1e-4, atol=1e-5)
    for a, b in zip(tensors(end), tensors(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_constructor_and_state_dict_are_torchs(config):
    theirs, ours = pair(*config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.extra_repr() == theirs.extra_repr() and repr(ours) == repr(theirs)
    assert ours._flat_weights_names == theirs._flat_weights_names
    torch.manual_seed(3)
    a = getattr(torch.nn, config[0])(I, H, **config[1])
    torch.manual_seed(3)
    b = getattr(seqkern.nn, config[0])(I, H, **config[1])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert [[id(w) for w in ws] for ws in b.all_weights] == [
        [id(getattr(b, n)) for n in names] for names in b._all_weights
    ]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0, 4), {}),
        ((4, 0), {}),
        ((4, 4), {"num_layers": 0}),
        ((4, 4), {"dropout": 2.0}),
        ((4, 4), {"bias": 1}),
        ((4, 4), {"batch_first": "yes"}),
        ((4.0, 4), {}),
        ((4, 4), {"proj_size": 4}),
        ((4, 4), {"proj_size": -1}),
        ((4, 4), {"nonlinearity": "elu"}),
        ((4,), {}),
        ((4, 4, 1, "elu"), {}),
    ],
)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_constructor_errors_are_torchs(kind, args, kwargs):
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, kind)(*args, **kwargs)
    with pytest.raises(theirs.type):
        getattr(seqkern.nn, kind)(*args, **kwargs)


def test_positional_nonlinearity_as_torch():
    assert (
        seqkern.nn.RNN(3, 4, 2, "relu", False).extra_repr()
        == torch.nn.RNN(3, 4, 2, "relu", False).extra_repr()
    )


def same(a, b, x):
    return all(torch.equal(s, t) for s, t in zip(tensors(a(x)), tensors(b(x)), strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_copies(run_on, config):
    _, ours = pair(*config)
    x = arguments(ours, "dense", False)[1][0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is type(ours) and same(ours, twin, x)


def test_weights_are_read_at_each_call(run_on):
    _, ours = pair("LSTM", {})
    x = torch.randn(T, B, I)
    before = ours(x)[0]
    ours.weight_hh_l0.data.mul_(0)  # a write that bumps no version
    after = ours(x)[0]
    assert not torch.allclose(before, after)
    ours.weight_ih_l0 = torch.nn.Parameter(torch.zeros_like(ours.weight_ih_l0))
    assert not torch.allclose(after, ours(x)[0])
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    assert not torch.func.functional_call(ours, zeros, (x,))[0].any()


def test_parametrized_and_weight_norm(run_on):
    theirs, ours = pair("GRU", {})
    x = torch.randn(T, B, I)
    for m in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)


def test_data_of_a_packed_sequence_keeps_its_order(run_on):
    sequences = [torch.randn(n, I) for n in (2, 6, 4)]
    _, ours = pair("LSTM", {"bidirectional": True})
    packed, (h_n, _) = ours(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)
    for i, s in enumerate(sequences):
        alone, (h, _) = ours(s)
        assert lengths[i] == len(s)
        torch.testing.assert_close(padded[: len(s), i], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(h_n[:, i], h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast_as_torch(kind):
    if kind == "LSTM" and torch.bfloat16 in _linear_backends.TERM_BY_TERM:
        pytest.skip("torch's own LSTM raises under autocast on this processor")
    theirs, ours = pair(kind, {"num_layers": 2})
    x = torch.randn(T, B, I)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = tensors(ours(given)), tensors(theirs(given))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_where_torchs_lstm_has_no_kernel(dtype, monkeypatch):
    monkeypatch.setattr(_linear_backends, "TERM_BY_TERM", frozenset((dtype,)))
    ours = seqkern.nn.LSTM(I, H, num_layers=2, bidirectional=True)
    given = torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=dtype):
        (choice, *_) = seqkern.explain(ours, given).rows
        got = tensors(ours(given))
    assert choice.backend == "cpu"
    want = tensors(copy.deepcopy(ours).to(dtype)(given.to(dtype)))
    assert all(torch.equal(a, b) and a.dtype is dtype for a, b in zip(got, want, strict=True))
    got[0].sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in ours.parameters())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("stands_in", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_sparse_weights_are_torchs(kind, stands_in):
    theirs = getattr(torch.nn, kind)(3, 4).requires_grad_(False)
    x = torch.randn(40, 5, 3)
    want = tensors(theirs(x))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        setattr(theirs, name, torch.nn.Parameter(getattr(theirs, name).to_sparse_csr(), requires_grad=False))
    if stands_in:
        with seqkern.enable():
            got = tensors(theirs(x))
    else:
        got = tensors(seqkern.accelerate(theirs)(x))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["packed", "projected", "empty", "without oneDNN"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_where_torchs_lstm_needs_no_kernel(form, dtype, monkeypatch):
    """What does not go to oneDNN runs on torch as ever, some of it in float32."""
    monkeypatch.setattr(_linear_backends, "TERM_BY_TERM", frozenset((dtype,)))
    theirs, ours = pair("LSTM", {"proj_size": 2} if form == "projected" else {})
    x = torch.randn(T, 0 if form == "empty" else B, I)
    given = pack_padded_sequence(x, [6, 4, 1]) if form == "packed" else x
    torch._C._set_mkldnn_enabled(form != "without oneDNN")
    try:
        with torch.autocast("cpu", dtype=dtype):
            got, want = tensors(ours(given)), tensors(theirs(given))
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_an_output_with_the_batch_first_may_be_written_to(run_on, kind):
    """torch's are no views there, of which some may not be written to."""
    ours = getattr(seqkern.nn, kind)(3, 4, batch_first=True)
    more, x = torch.ones(4, requires_grad=True), torch.randn(2, 5, 3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output, _ = ours(x)
        output += more
        (found,) = torch.autograd.grad(output.sum(), more, retain_graph=True)
        assert torch.equal(found, torch.full((4,), 10.0))
        if grad:
            theirs = getattr(torch.nn, kind)(3, 4, batch_first=True)
            theirs.load_state_dict(ours.state_dict())
            (output - more).square().sum().backward()
            theirs(x)[0].square().sum().backward()
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
        with torch.set_grad_enabled(grad):
            ours(torch.randn(2, 5, 3))[0].detach_()


def test_torchs_lesser_methods():
    for kind, hx in (("LSTM", (torch.zeros(1, 2, 4),) * 2), ("GRU", torch.zeros(1, 2, 4))):
        theirs, ours = (getattr(each, kind)(3, 4) for each in (torch.nn, seqkern.nn))
        ours.check_forward_args(torch.zeros(5, 2, 3), hx, None)
        assert all(hasattr(ours, name) for name in dir(theirs))
