"""seqkern.nn.MultiheadAttention against torch.nn's: every option, mask and result, transforms, compilers, errors."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import seqkern
from seqkern.ops import _backend
from seqkern.testing import relative_rms, tolerance, worst

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage",  # torch's
)
E, H, B, L, S = 8, 2, 3, 5, 4
BUILDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim vdim": {"kdim": 6, "vdim": 10},
    "kdim vdim no bias": {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
    "bias kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "bias kv and zero": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
}
FORMS = ("self", "shared memory", "three inputs", "unbatched")
MASKS = ("none", "bool", "bool per head", "float", "float per head", "hint")
PADDINGS = ("none", "bool", "float")
WEIGHTS = (None, "mean", "heads")
MASKED = [  # of one kind: torch warns of two
    (mask, padding)
    for mask, padding in itertools.product(MASKS, PADDINGS)
    if "none" in (mask, padding) or mask.startswith(padding) or (mask, padding) == ("hint", "bool")
]
PRODUCT = [
    (build, form, mask, padding, weights)
    for build, form, (mask, padding), weights in itertools.product(BUILDS, FORMS, MASKED, WEIGHTS)
    if not (form in ("self", "shared memory") and BUILDS[build].get("kdim"))
    and not (form == "unbatched" and BUILDS[build].get("batch_first"))
]
FORCED = ["reference", pytest.param("cpu", marks=pytest.mark.built)]


def pair(dtype=torch.float32, **options):
    """torch's module, and ours with the same weights."""
    theirs = torch.nn.MultiheadAttention(E, H, dtype=dtype, **options)
    ours = seqkern.nn.MultiheadAttention(E, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves_of(module, form):
    """The distinct inputs of a form, and a function that makes query, key and value of them."""
    lead = {"query": (L, B), "key": (S, B)}
    if form == "unbatched":
        lead = {"query": (L,), "key": (S,)}
    elif module.batch_first:
        lead = {"query": (B, L), "key": (B, S)}
    query = torch.randn(*lead["query"], E)
    if form == "self":
        return [query], lambda q: (q, q, q)
    if form == "shared memory":
        return [query, torch.randn(*lead["key"], E)], lambda q, m: (q, m, m)
    memory = torch.randn(*lead["key"], module.kdim), torch.randn(*lead["key"], module.vdim)
    return [query, *memory], lambda q, k, v: (q, k, v)


def masks_of(form, mask, padding):
    """Keyword arguments; float masks are leaves of their own and stay out of this where gradients are compared."""
    keys, batch = L if form == "self" else S, () if form == "unbatched" else (B,)
    found: dict = {}
    if mask != "none":
        lead = (H * (B if batch else 1),) if mask.endswith("head") else ()
        hidden = torch.rand(*lead, L, keys) > 0.7
        hidden[..., 0] = False
        if mask == "hint":
            hidden, found["is_causal"] = torch.ones(L, keys).triu(1).bool(), True
        found["attn_mask"] = hidden if mask.startswith(("bool", "hint")) else torch.randn(*lead, L, keys)
    if padding != "none":
        hidden = torch.zeros(*batch, keys, dtype=torch.bool)
        hidden[..., -1] = True
        found["key_padding_mask"] = hidden if padding == "bool" else torch.randn(*batch, keys)
    return found


def in_dtype(value, dtype):
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def results(module, leaves, build, options, dtype):
    """Output, weights and all gradients of a loss that weighs every element differently, in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
    found = module(*build(*leaves), **{k: in_dtype(v, dtype) for k, v in options.items()})
    outs = {name: t for name, t in zip(("output", "weights"), found) if t is not None}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
        for t in outs.values()
    )
    wanted = dict(enumerate(leaves)) | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {k: t.detach() for k, t in outs.items()} | {f"d {k}": g for k, g in zip(wanted, grads)}


def hold(got, theirs, exact, dtype):
    assert got.keys() == exact.keys()
    for name, true in exact.items():
        assert (got[name].shape, got[name].dtype) == (theirs[name].shape, theirs[name].dtype), name
        error, allowed = relative_rms(got[name], true), tolerance(dtype, relative_rms(theirs[name], true))
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g} at {worst(got[name], true)}"


@pytest.mark.parametrize(("build", "form", "mask", "padding", "weights"), PRODUCT)
def test_as_torch(build, form, mask, padding, weights):
    theirs, ours = pair(**BUILDS[build])
    leaves, arrange = leaves_of(ours, form)
    options = masks_of(form, mask, padding)
    options |= {"need_weights": weights is not None, "average_attn_weights": weights != "heads"}
    exact = results(theirs, leaves, arrange, options, torch.float64)
    hold(results(ours, leaves, arrange, options, torch.float64), exact, exact, torch.float64)
    want = results(theirs, leaves, arrange, options, torch.float32)
    hold(results(ours, leaves, arrange, options, torch.float32), want, exact, torch.float32)
    with torch.no_grad():  # where torch may take its native path
        found = [m.eval()(*arrange(*leaves), **options) for m in (ours, theirs)]
    names = ("output", "weights")
    mine, other = ({k: t for k, t in zip(names, each) if t is not None} for each in found)
    hold(mine, other, {k: exact[k] for k in other}, torch.float32)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradient_of_a_float_mask(weights):
    theirs, ours = pair(torch.float64, batch_first=True)
    x = torch.randn(B, L, E, dtype=torch.float64)
    masks = torch.randn(B * H, L, L, dtype=torch.float64), torch.randn(B, L, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        attn, padding = (m.clone().requires_grad_() for m in masks)
        outs = module(x, x, x, padding, weights is not None, attn, weights == "mean")
        loss = sum(t.square().sum() for t in outs if t is not None)
        found.append(torch.autograd.grad(loss, (attn, padding)))
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other)


def test_masks_of_two_kinds_warn_as_torch():
    _, ours = pair()
    x = torch.randn(L, B, E)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        ours(x, x, x, key_padding_mask=torch.zeros(B, L), attn_mask=torch.zeros(L, L, dtype=torch.bool))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_hint_that_is_no_causal_mask_is_not_believed_where_torch_reads_the_mask(weights):
    theirs, ours = pair()
    x, mask = torch.randn(L, B, E), torch.rand(L, L) > 0.5
    mask[:, 0] = False
    options = {"attn_mask": mask, "is_causal": True, "need_weights": weights is not None}
    options["key_padding_mask"] = torch.zeros(B, L, dtype=torch.bool)
    torch.testing.assert_close(ours(x, x, x, **options)[0], theirs(x, x, x, **options)[0])


@pytest.mark.parametrize("training", [False, True])
def test_no_hint_may_be_none(training):
    theirs, ours = pair()
    x = torch.randn(L, B, E)
    found = (m.train(training)(x, x, x, is_causal=None) for m in (ours, theirs))
    torch.testing.assert_close(*(output for output, _ in found))
    ours(x, x, x, is_causal=None, need_weights=False)  # torch: not where it trains


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_causal_mask_that_is_learned_gets_its_gradient_where_torch_reads_the_mask(weights):
    modules = pair(torch.float64, batch_first=True)
    x, padding = torch.randn(B, L, E, dtype=torch.float64), torch.randn(B, L, dtype=torch.float64)
    found = []
    for module in modules:
        mask = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1).requires_grad_()
        output, _ = module(x, x, x, padding, weights is not None, mask, weights == "mean", is_causal=True)
        found.append(torch.autograd.grad(output.square().sum(), mask)[0])
    torch.testing.assert_close(*found)


def asked_of_attention(module, *args, **kwargs):
    """The tensors and options of the attention calls that a module makes."""
    with _backend.watch() as seen:
        module(*args, **kwargs)
    return [(call.tensors, call.wanted.options) for call, _ in seen]


def test_masks_have_no_size_for_heads():
    _, ours = pair(batch_first=True)
    x, causal = torch.randn(B, L, E), torch.ones(L, L).triu(1).bool()
    padding = torch.zeros(B, L, dtype=torch.bool)
    for options, shape, right in (
        ({"key_padding_mask": padding}, (B, 1, 1, L), -1),
        ({"attn_mask": causal}, (1, 1, L, L), -1),
        ({"attn_mask": causal, "is_causal": True}, None, 0),
        ({"attn_mask": causal, "is_causal": True, "key_padding_mask": padding}, (B, 1, 1, L), 0),
        ({"attn_mask": causal, "key_padding_mask": padding}, (B, 1, L, L), -1),
    ):
        ((t, o),) = asked_of_attention(ours, x, x, x, need_weights=False, **options)
        assert (None if t.mask is None else tuple(t.mask.shape), o.window_right) == (shape, right)
        assert t.bias is None


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_query_that_sees_nothing_gives_the_bias(weights):
    _, ours = pair(batch_first=True)
    torch.nn.init.normal_(ours.out_proj.bias)
    x, hidden = torch.randn(B, L, E, requires_grad=True), torch.zeros(B, L, dtype=torch.bool)
    hidden[1] = True
    output, shares = ours(x, x, x, hidden, weights is not None, average_attn_weights=weights != "heads")
    assert torch.equal(output[1], ours.out_proj.bias.expand(L, E))
    assert shares is None or not shares[1].any()
    output.sum().backward()
    assert not x.grad[1].any()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_padding_hides_does_not_leak(weights):
    _, ours = pair(batch_first=True)
    q, memory, hidden = torch.randn(B, L, E), torch.randn(B, S, E), torch.zeros(B, S, dtype=torch.bool)
    hidden[:, -1] = True
    want = ours(q, memory, memory, hidden, weights is not None)[0]
    memory[:, -1] = torch.nan
    torch.testing.assert_close(ours(q, memory, memory, hidden, weights is not None)[0], want)


def test_dropout():
    _, ours = pair(dropout=0.4, batch_first=True)
    x = torch.randn(2, 16, E)
    torch.manual_seed(5)
    first = ours(x, x, x, average_attn_weights=False)
    torch.manual_seed(5)
    again = ours(x, x, x, average_attn_weights=False)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other = ours(x, x, x, average_attn_weights=False)
    assert not torch.equal(first[0], other[0])
    draws = torch.stack([ours(x, x, x, average_attn_weights=False)[1] for _ in range(200)])
    kept = ours.eval()(x, x, x, average_attn_weights=False)[1]
    assert abs((draws == 0).float().mean() - 0.4) < 0.01
    torch.testing.assert_close(draws.mean(0), kept, rtol=0.5, atol=0.05)
    torch.testing.assert_close(draws[draws != 0], (kept / 0.6).expand_as(draws)[draws != 0])
    silent = seqkern.nn.MultiheadAttention(E, H, dropout=1.0)
    assert torch.equal(silent(x, x, x)[0], silent.out_proj.bias.expand_as(x))


def test_constructor_and_state_dict_are_torchs():
    for options in BUILDS.values():
        torch.manual_seed(3)
        theirs = torch.nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(3)
        ours = seqkern.nn.MultiheadAttention(E, H, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert isinstance(ours, torch.nn.MultiheadAttention)
        x = leaves_of(ours, "three inputs")[0]
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours) and torch.equal(twin(*x)[0], ours(*x)[0])


x3, m3 = torch.zeros(L, B, E), torch.zeros(S, B, E)
BAD = {
    "query of four dimensions": lambda m: m(x3[None], x3[None], x3[None]),
    "key unbatched": lambda m: m(x3, m3[:, 0], m3[:, 0]),
    "key batched": lambda m: m(x3[:, 0], m3, m3),
    "query features": lambda m: m(x3[..., :6], m3, m3),
    "key features": lambda m: m(x3, m3[..., :6], m3[..., :6]),
    "key and value": lambda m: m(x3, m3, m3[:2]),
    "batch": lambda m: m(x3, m3[:, :2], m3[:, :2]),
    "dtype": lambda m: m(x3.double(), m3.double(), m3.double()),
    "mask of integers": lambda m: m(x3, m3, m3, attn_mask=torch.zeros(L, S, dtype=torch.int64)),
    "padding of integers": lambda m: m(x3, m3, m3, torch.zeros(B, S, dtype=torch.int64)),
    "mask size": lambda m: m(x3, m3, m3, attn_mask=torch.zeros(L, S + 1)),
    "mask per head size": lambda m: m(x3, m3, m3, attn_mask=torch.zeros(B, L, S)),
    "mask rank": lambda m: m(x3, m3, m3, attn_mask=torch.zeros(1, 1, L, S)),
    "mask of one sequence": lambda m: m(x3[:, 0], m3[:, 0], m3[:, 0], attn_mask=torch.zeros(3, L, S)),
    "padding size": lambda m: m(x3, m3, m3, torch.zeros(B, S + 1)),
    "padding batch": lambda m: m(x3, m3, m3, torch.zeros(B + 1, S)),
    "padding rank": lambda m: m(x3, m3, m3, torch.zeros(S)),
    "padding of one sequence": lambda m: m(x3[:, 0], m3[:, 0], m3[:, 0], torch.zeros(1, S)),
    "mask that is no tensor": lambda m: m(x3, m3, m3, attn_mask=[[0.0] * S] * L),
    "padding that is no tensor": lambda m: m(x3, m3, m3, [[False] * S] * B),
    "hint without a mask": lambda m: m(x3, x3, x3, is_causal=True),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_of_torchs_type(name):
    theirs, ours = pair()
    with pytest.raises(Exception) as expected:
        BAD[name](theirs)
    with pytest.raises(expected.type):
        BAD[name](ours)


@pytest.mark.parametrize("args", [(0, 2), (8, 0), (8, 3)])
def test_constructor_errors_are_torchs(args):
    with pytest.raises(Exception) as expected:
        torch.nn.MultiheadAttention(*args)
    with pytest.raises(expected.type):
        seqkern.nn.MultiheadAttention(*args)


def nested_of(*lengths):
    x = torch.randn(len(lengths), max(lengths), E)
    real = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    return torch._nested_tensor_from_mask(x, real)


@pytest.mark.parametrize("backend", [None, "torch", *FORCED])
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_nested_tensors_as_torch(weights, backend):
    if weights and backend == "torch":
        pytest.skip("torch's kernel does not give weights")
    theirs, ours = (m.eval() for m in pair(batch_first=True))
    nested = nested_of(5, 2, 4)
    options = {"need_weights": weights is not None, "average_attn_weights": weights != "heads"}
    want, theirs_shares = theirs(nested, nested, nested, **options)
    with seqkern.backend(backend):
        got, shares = ours(nested, nested, nested, **options)
    assert got.is_nested
    torch.testing.assert_close(got.to_padded_tensor(0.0), want.to_padded_tensor(0.0))
    if weights:
        torch.testing.assert_close(shares, theirs_shares)


def test_nested_tensors_are_refused_where_torch_refuses():
    theirs, ours = pair(batch_first=True)
    nested = nested_of(5, 2)
    for call in (
        lambda m: m.train()(nested, nested, nested),
        lambda m: m.eval()(nested, nested, nested),  # with gradients
        lambda m: m.eval().requires_grad_(False)(nested, nested.clone(), nested),
    ):
        with pytest.raises(AssertionError):
            call(theirs)
        with pytest.raises(AssertionError, match="to_padded_tensor"):
            call(ours)


def close(a, b, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def outputs_of(module, padding=None):
    return lambda x: module(x, x, x, padding)[0]


def test_transforms():
    theirs, ours = pair(torch.float64, batch_first=True)
    x, tangent = torch.randn(2, B, L, E, dtype=torch.float64)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[:, -1] = True
    f = outputs_of(ours, padding)
    params = dict(ours.named_parameters())

    def loss(module):
        return lambda p: functional_call(module, p, (x, x, x, padding))[0].square().sum()

    want = torch.autograd.grad(loss(theirs)(dict(theirs.named_parameters())), list(theirs.parameters()))
    for a, b in zip(grad(loss(ours))(params).values(), want, strict=True):
        close(a, b)
    _, along = jvp(f, (x,), (tangent,))
    close(along, (f(x + 1e-6 * tangent) - f(x - 1e-6 * tangent)).detach() / 2e-6, 1e-4, 1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, along)
    assert along.any()
    one = outputs_of(ours)
    close(vmap(one)(x), one(x))
    per_sample = vmap(grad(lambda x: one(x).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    close(per_sample, torch.autograd.grad(one(leaf).square().sum(), leaf)[0])
    compiled = torch.compile(vmap(grad(lambda x: one(x).square().sum())), fullgraph=True, backend="aot_eager")
    close(compiled(x), per_sample)


@pytest.mark.parametrize("backend", FORCED)  # torch's own kernel has no second derivative
@pytest.mark.parametrize("weights", WEIGHTS)
def test_second_derivatives(weights, backend):
    _, ours = pair(torch.float64, batch_first=True)
    names = [name for name, _ in ours.named_parameters()]
    causal = torch.ones(L, L).triu(1).bool()

    def run(x, *p):
        options = {"need_weights": weights is not None, "average_attn_weights": weights != "heads"}
        found = functional_call(ours, dict(zip(names, p)), (x, x, x), {"attn_mask": causal, **options})
        return tuple(t for t in found if t is not None)

    inputs = torch.randn(2, L, E, dtype=torch.float64), *(p.detach() for p in ours.parameters())
    inputs = tuple(t.requires_grad_() for t in inputs)
    with seqkern.backend(backend):
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("build", ["plain", "batch first", "bias kv and zero"])
def test_compile_without_a_graph_break(build, weights):
    theirs, ours = pair(**BUILDS[build])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaves, arrange = leaves_of(ours, "three inputs" if ours.kdim != E else "self")
    form = "self" if len(leaves) == 1 else "three inputs"
    for mask, padding in (("none", "bool"), ("bool", "none"), ("hint", "bool"), ("float", "float")):
        options = masks_of(form, mask, padding) | {"need_weights": weights is not None}
        found = []
        for module in (compiled, theirs):
            given = [t.clone().requires_grad_() for t in leaves]
            output, _ = module(*arrange(*given), **options)
            found.append([output, *torch.autograd.grad(output.square().sum(), given)])
        for mine, other in zip(*found):
            close(mine, other, 1e-4, 1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    theirs, ours = pair(batch_first=True)
    x, padding = torch.randn(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    program = torch.export.export(ours.eval(), (x, x, x, padding), strict=strict)
    close(program.module()(x, x, x, padding)[0], theirs(x, x, x, padding)[0], 1e-4, 1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_autocast_as_torch(weights):
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, L, E)
    exact = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (m(x, x, x, need_weights=weights is not None)[0] for m in (ours, theirs))
    assert got.dtype == want.dtype
    assert relative_rms(got, exact) <= tolerance(got.dtype, relative_rms(want, exact))


def test_parametrized_projection():
    theirs, ours = pair(batch_first=True)
    for m in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(m, "in_proj_weight")
        torch.nn.utils.parametrizations.weight_norm(m.out_proj, "weight")
    x = torch.randn(B, L, E)
    close(ours(x, x, x)[0], theirs(x, x, x)[0], 1e-4, 1e-5)


@pytest.mark.parametrize("sizes", [(0, L, S), (B, 0, S), (0, 0, 0)])
def test_empty_as_torch(sizes):
    theirs, ours = pair(batch_first=True)
    b, n, s = sizes
    q, memory = torch.zeros(b, n, E), torch.zeros(b, s, E)
    assert ours(q, memory, memory)[0].shape == theirs(q, memory, memory)[0].shape
    for weights in (False, True):
        assert ours(q, q, q, need_weights=weights)[0].shape == q.shape


@pytest.mark.parametrize("backend", FORCED)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("mask", "padding"), MASKED)
def test_forced_backends(backend, mask, padding, weights):
    theirs, ours = pair(batch_first=True)
    leaves, arrange = leaves_of(ours, "self")
    options = masks_of("self", mask, padding)
    options |= {"need_weights": weights is not None, "average_attn_weights": weights != "heads"}
    exact = results(theirs, leaves, arrange, options, torch.float64)
    want = results(theirs, leaves, arrange, options, torch.float32)
    with seqkern.backend(backend):
        hold(results(ours, leaves, arrange, options, torch.float32), want, exact, torch.float32)


@pytest.mark.parametrize("weights", [{}, {"average_attn_weights": False}, {"need_weights": False}], ids=str)
def test_torch_forced_is_torchs(weights):
    theirs = torch.nn.MultiheadAttention(E, H)
    ours, x = seqkern.accelerate(copy.deepcopy(theirs)), torch.randn(5, 3, E)
    with seqkern.backend("torch"):
        got = ours(x, x, x, **weights)
        assert [row.backend for row in seqkern.explain(ours, x, x, x, **weights).rows] == ["torch"]
    for one, other in zip(got, theirs(x, x, x, **weights)):
        assert one is other is None or torch.allclose(one, other, atol=1e-6)


def test_inputs_of_another_dtype():
    module = seqkern.nn.MultiheadAttention(E, H)
    x = torch.randn(3, 2, E)
    with pytest.raises(
        RuntimeError, match=r"key is torch.float64 and the weights are torch.float32.*key.to\(torch.float32\)"
    ):
        module(x, x.double(), x)
    with pytest.raises(RuntimeError, match=r"query is torch\.bfloat16"):
        module(*[x.bfloat16()] * 3)
