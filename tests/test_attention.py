"""Attention as an op and as functions: backends, errors at the door."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import seqkern
from seqkern.functional import attention, scaled_dot_product_attention
from seqkern.ops import _backend
from seqkern.ops._attention_backends import CPU_READY
from seqkern.ops.attention import NEEDS
from seqkern.spec import attention as spec
from seqkern.testing_attention import OPTIONS, PACKED, check, draw_options, keywords, make_case

forward = torch.ops.seqkern.attention
backward = torch.ops.seqkern.attention_backward


def arguments(case, requires_grad=True):
    tensors = (
        x.clone().requires_grad_(requires_grad) if x is not None and x.is_floating_point() else x
        for x in case.tensors
    )
    return (*tensors, *case.options)


def chosen(run):
    with _backend.watch() as seen:
        run()
    return [choice for _, choice in seen]


# the ops


@pytest.mark.parametrize("lengths", [(), PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_op_meets_oracle(dtype, options, lengths):
    check(make_case(dtype, lengths=lengths, **OPTIONS[options]))


@pytest.mark.parametrize("lengths", [(), PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("options", ["plain", "everything", "bias, keys"])
def test_opcheck(options, lengths):
    case = make_case(lengths=lengths, **OPTIONS[options], weights="" if lengths else "mean")
    torch.library.opcheck(forward, arguments(case))
    torch.library.opcheck(forward, arguments(case, requires_grad=False))
    given = arguments(case, requires_grad=False)
    output, lse, weights = forward(*given)
    grads = (*case.grads, torch.randn_like(weights) if weights.numel() else None)
    torch.library.opcheck(backward, (*grads, output, lse, *given, *((True,) * len(NEEDS))))
    for need in range(len(NEEDS)):
        needs = [n == need for n in range(len(NEEDS))]
        torch.library.opcheck(backward, (*grads, output, lse, *given, *needs), test_utils="test_faketensor")


@pytest.mark.parametrize("lengths", [(), ((2, 3), (1, 2))], ids=["dense", "packed"])
@pytest.mark.parametrize("options", ["plain", "everything", "sinks in a window"])
def test_op_gradients(options, lengths):
    case = make_case(torch.float64, Hq=2, Hkv=1, L=3, S=3, D=2, lengths=lengths, **OPTIONS[options])
    given = arguments(case)
    places = [n for n, x in enumerate(given) if isinstance(x, torch.Tensor) and x.requires_grad]

    def run(*leaves):
        filled = list(given)
        for n, x in zip(places, leaves):
            filled[n] = x
        output, lse, _ = forward(*filled)
        return output, torch.where(lse == -torch.inf, 0.0, lse)

    leaves = [given[n] for n in places]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_results_merge_their_heads_without_a_copy(dtype):
    case = make_case(dtype)
    output, lse, weights = forward(*arguments(case, False))
    assert output.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32 and weights.shape == (0,)


# the wide door


@pytest.mark.parametrize("lengths", [(), PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_wide_door_is_the_spec(options, lengths):
    case = make_case(torch.float64, lengths=lengths, **OPTIONS[options])
    want, want_lse, _ = spec.attention(*case.tensors, *case.options)
    output, lse = attention(*case.tensors[:3], **keywords(case), return_lse=True)
    torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    alone = attention(*case.tensors[:3], **keywords(case))  # torch's kernel where it can
    torch.testing.assert_close(alone, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options", [n for n, o in OPTIONS.items() if not {"softcap", "sinks", "dropout_p"} & {*o}]
)
def test_torch_serves_what_it_can_express(options):
    case = make_case(torch.float64, **OPTIONS[options])
    leaves = [x.requires_grad_() for x in case.tensors if x is not None and x.is_floating_point()]
    with seqkern.backend("torch"):
        output = attention(*case.tensors[:3], **keywords(case))
    want = spec.attention(*case.tensors, *case.options)[0]
    torch.testing.assert_close(output, want, rtol=1e-10, atol=1e-10)
    for got, d in zip(*(torch.autograd.grad(x, leaves, case.grads[0]) for x in (output, want))):
        torch.testing.assert_close(got, d, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["torch", "reference", *["cpu"] * CPU_READY])
def test_nan_behind_a_mask_of_every_query(name):
    case = make_case(mask="heads shared")
    q, k, v = case.tensors[:3]
    want = attention(q, k, v, mask=case.tensors.mask, backend=name)
    for x in (k, v):
        x[:, :, -1] = torch.nan
    assert torch.equal(attention(q, k, v, mask=case.tensors.mask, backend=name), want)


def test_weights():
    case = make_case(torch.float64, weights="heads", **OPTIONS["everything"])
    q, k, v = case.tensors[:3]
    output, heads = attention(q, k, v, **keywords(case), return_weights="heads")
    output_2, lse, mean = attention(q, k, v, **keywords(case), return_weights="mean", return_lse=True)
    assert torch.equal(output, output_2) and lse.shape == heads.shape[:3]
    torch.testing.assert_close(heads.mean(1), mean)
    torch.testing.assert_close(heads @ v.repeat_interleave(2, 1), output)


def test_dropout_draws_from_torchs_generator():
    case = make_case()
    q, k, v = case.tensors[:3]

    def run(**options):
        return attention(q, k, v, dropout_p=0.5, backend="reference", **options)

    torch.manual_seed(1)
    first = run()
    assert not torch.equal(first, run())
    torch.manual_seed(1)
    assert torch.equal(first, run())
    seed = torch.tensor([7])
    assert torch.equal(run(dropout_seed=seed), run(dropout_seed=seed))
    assert (attention(q, k, v, dropout_p=1.0) == 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"softcap": 1.0}, "softcap"),
        ({"return_lse": True}, "log-sum-exp"),
        ({"return_weights": "mean"}, "weights"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"dropout_p": 0.5, "dropout_seed": torch.tensor([1])}, "seed"),
    ],
)
def test_torch_declines_with_a_reason(options, says):
    q, k, v = make_case().tensors[:3]
    (choice,) = chosen(lambda: attention(q, k, v, **options))
    assert choice.name == ("cpu" if CPU_READY else "reference")
    with pytest.raises(RuntimeError, match=f"'torch' was forced for attention.*{says}"):
        attention(q, k, v, **options, backend="torch")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_that_cannot_serve_say_why(name):
    q, k, v = make_case().tensors[:3]
    with pytest.raises(
        RuntimeError, match=f"'{name}' was forced for attention.*(no {name} kernel|not on a GPU)"
    ):
        attention(q, k, v, backend=name)
    with seqkern.backend(name), pytest.raises(RuntimeError, match="was forced for attention"):
        scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_explain_names_the_backend():
    q, k, v = make_case().tensors[:3]
    said = str(
        seqkern.explain(vmap(lambda q, k, v: attention(q[None], k[None], v[None], softcap=2.0)), q, k, v)
    )
    assert "(attention): reference" in said and "torch declined: torch's scaled_dot_product" in said
    said = str(seqkern.explain(scaled_dot_product_attention, q[None], k[None], v[None], enable_gqa=True))
    assert (
        "(attention): torch" in said and "cpu declined: query, key and value are not all of one rank" in said
    )


def test_autocast_is_torchs():
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in make_case().tensors[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = F.scaled_dot_product_attention(q, k, v)
        for run in (attention, scaled_dot_product_attention):
            assert run(q, k, v).dtype == want.dtype == torch.bfloat16
            torch.testing.assert_close(run(q, k, v), want, atol=1e-2, rtol=2e-2)
        assert attention(q, k, v, softcap=2.0).dtype == torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    B=st.integers(0, 3),
    groups=st.integers(1, 3),
    Hkv=st.integers(1, 2),
    L=st.integers(0, 6),
    S=st.integers(0, 6),
    D=st.integers(1, 9),
    Dv=st.integers(1, 9),
)
def test_any_shape_and_options(data, B, groups, Hkv, L, S, D, Dv):
    sizes = {"B": B, "Hq": groups * Hkv, "Hkv": Hkv, "L": L, "S": S, "D": D, "Dv": Dv}
    drawn = draw_options(data.draw, st, 4)
    check([make_case(**sizes, **drawn, seed=seed) for seed in range(4)], slack=4)  # a single score may cancel


# torch's own door


def qkv(Hkv=4, rank=4, dtype=torch.float32):
    case = make_case(dtype, Hkv=Hkv)
    return [x[(0,) * (4 - rank)] for x in case.tensors[:3]]


@pytest.mark.parametrize("name", ["reference", "torch", None])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("how", ["plain", "causal", "scale", "mask", "float mask"])
def test_torchs_door(how, rank, name):
    q, k, v = (x.requires_grad_() for x in qkv(rank=rank, dtype=torch.float64))
    options = {"causal": {"is_causal": True}, "scale": {"scale": 0.3}}.get(how, {})
    leaves = [q, k, v]
    if "mask" in how:
        m = torch.randn(q.shape[-2], k.shape[-2], dtype=torch.float64)
        options["attn_mask"] = m > 0 if how == "mask" else m.requires_grad_()
        leaves += [] if how == "mask" else [m]
    want = F.scaled_dot_product_attention(q, k, v, **options)
    with seqkern.backend(name):
        got = scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, want))):
        torch.testing.assert_close(a, b)


def test_torchs_door_groups_heads():
    q, k, v = qkv(Hkv=2)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for name in ("reference", "torch"):
        with seqkern.backend(name):
            torch.testing.assert_close(scaled_dot_product_attention(q, k, v, enable_gqa=True), want)


def test_torchs_door_takes_torchs_arguments_by_place():
    q, k, v = qkv()
    mask = torch.zeros(5, 7)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, mask, 0.0, False),
        F.scaled_dot_product_attention(q, k, v, mask, 0.0, False),
    )


# arguments beyond the contract: what torch makes of them, result or error
BEYOND = {
    "rank 1": lambda q, k, v: ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
    "rank 5": lambda q, k, v: ((q[None], k[None], v[None]), {}),
    "mixed ranks": lambda q, k, v: ((q, k[0], v[0]), {}),
    "dtypes": lambda q, k, v: ((q, k.double(), v), {}),
    "integers": lambda q, k, v: ((q.long(), k.long(), v.long()), {}),
    "heads": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {}),
    "one head": lambda q, k, v: ((q, k[:, :1], v[:, :1]), {}),
    "heads, grouped": lambda q, k, v: ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
    "batch": lambda q, k, v: ((q, k[:1], v[:1]), {}),
    "head size": lambda q, k, v: ((q, k[..., :4], v), {}),
    "integer mask": lambda q, k, v: ((q, k, v, torch.ones(5, 7).long()), {}),
    "double mask": lambda q, k, v: ((q, k, v, torch.ones(5, 7).double()), {}),
    "mask shape": lambda q, k, v: ((q, k, v, torch.ones(5, 6).bool()), {}),
    "mask rank": lambda q, k, v: ((q, k, v, torch.ones(1, 1, 1, 5, 7).bool()), {}),
    "mask and causal": lambda q, k, v: ((q, k, v, torch.ones(5, 7).bool()), {"is_causal": True}),
    "device": lambda q, k, v: ((q, k.to("meta"), v), {}),
    "none": lambda q, k, v: ((None, k, v), {}),
    "dropout": lambda q, k, v: ((q, k, v), {"dropout_p": 2.0}),
}


@pytest.mark.parametrize("what", BEYOND)
def test_torchs_door_beyond_the_contract(what):
    args, options = BEYOND[what](*qkv())

    def outcome(run):
        try:
            return run(*args, **options)
        except Exception as error:
            return type(error)

    got, want = (outcome(run) for run in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert got is want if isinstance(want, type) else torch.equal(got, want)


# mistakes at the wide door


def small(**changes):
    found = dict(zip(("query", "key", "value"), make_case().tensors[:3]))
    return found | changes


def packed(**changes):
    case = make_case(lengths=((2, 3), (3, 4)))
    t = case.tensors
    found = {"query": t.query, "key": t.key, "value": t.value}
    return found | {"cu_seqlens_q": t.cu_seqlens_q, "cu_seqlens_k": t.cu_seqlens_k} | changes


MISTAKES = {
    "not a tensor": (lambda: small(query=[1.0]), TypeError, "query is of type list"),
    "integer query": (
        lambda: small(query=torch.ones(2, 4, 5, 8).long()),
        RuntimeError,
        "query is torch.int64",
    ),
    "dtypes": (
        lambda: small(key=torch.ones(2, 2, 7, 8).double()),
        RuntimeError,
        r"key torch.float64.*\.to\(dtype",
    ),
    "devices": (lambda: small(value=torch.ones(2, 2, 7, 8, device="meta")), RuntimeError, "value on meta"),
    "rank": (lambda: small(query=torch.ones(4, 5, 8)), RuntimeError, "query is 3-D.*cu_seqlens"),
    "batch": (lambda: small(query=torch.ones(3, 4, 5, 8)), RuntimeError, "batch 3 and key 2"),
    "head size": (lambda: small(query=torch.ones(2, 4, 5, 9)), RuntimeError, "head size 9.*key 8"),
    "heads": (
        lambda: small(query=torch.ones(2, 5, 4, 8)),
        RuntimeError,
        r"5 heads and key 2.*\[batch, heads",
    ),
    "value length": (
        lambda: small(value=torch.ones(2, 2, 6, 8)),
        RuntimeError,
        r"key is \[2, 2, 7, 8\] and value",
    ),
    "mask dtype": (lambda: small(mask=torch.ones(5, 7)), RuntimeError, "mask is torch.float32.*bias"),
    "mask shape": (
        lambda: small(mask=torch.ones(5, 6).bool()),
        RuntimeError,
        r"mask is \[5, 6\].*\[2, 4, 5, 7\]",
    ),
    "mask rank": (lambda: small(mask=torch.ones(1, 1, 1, 5, 7).bool()), RuntimeError, "mask is"),
    "bias dtype": (lambda: small(bias=torch.ones(5, 7).long()), RuntimeError, "bias is torch.int64"),
    "bias shape": (lambda: small(bias=torch.ones(3, 1, 5, 7)), RuntimeError, r"bias is \[3, 1, 5, 7\]"),
    "slopes": (
        lambda: small(alibi_slopes=torch.ones(2)),
        RuntimeError,
        r"alibi_slopes is \[2\].*\[4\] or \[2, 4\]",
    ),
    "sinks": (lambda: small(sinks=torch.ones(2)), RuntimeError, r"sinks is \[2\], expected \[4\]"),
    "dropout": (lambda: small(dropout_p=1.5), RuntimeError, "dropout_p is 1.5"),
    "seed": (
        lambda: small(dropout_p=0.5, dropout_seed=torch.ones(1)),
        RuntimeError,
        "dropout_seed is torch.float32",
    ),
    "seed type": (lambda: small(dropout_p=0.5, dropout_seed=5), TypeError, "dropout_seed is of type int"),
    "8 bits": (
        lambda: {name: x.to(torch.float8_e5m2) for name, x in small().items()},
        RuntimeError,
        "float8_e5m2.*16 bits",
    ),
    "dropout type": (lambda: small(dropout_p=None), TypeError, "dropout_p is None"),
    "scale type": (lambda: small(scale="wide"), TypeError, "scale is 'wide'"),
    "learned scale": (lambda: small(scale=torch.ones((), requires_grad=True)), TypeError, "multiply query"),
    "softcap type": (lambda: small(softcap="low"), TypeError, "softcap is 'low'"),
    "softcap without end": (lambda: small(softcap=math.inf), ValueError, "softcap is inf"),
    "softcap unknown": (lambda: small(softcap=math.nan), ValueError, "softcap is nan"),
    "window of parts": (lambda: small(window=1.5), TypeError, "window is 1.5"),
    "longest alone": (lambda: small(max_seqlen_q=5), RuntimeError, "without cu_seqlens"),
    "window": (lambda: small(window=(-1, 2)), ValueError, "negative; None for no limit"),
    "window of words": (lambda: small(window="all"), TypeError, "window is 'all'"),
    "causal": (lambda: small(causal="left"), ValueError, "'top-left' or 'bottom-right'"),
    "softcap": (lambda: small(softcap=-1.0), ValueError, "softcap is -1.0"),
    "weights": (lambda: small(return_weights="all"), ValueError, "'heads' or 'mean'"),
    "packed rank": (lambda: packed(query=torch.ones(1, 5, 4, 8)), RuntimeError, "query is 4-D.*3-D"),
    "packed alone": (lambda: packed(cu_seqlens_k=None), RuntimeError, "cu_seqlens_k is missing"),
    "packed weights": (lambda: packed(return_weights="mean"), ValueError, "dense input"),
    "packed counts": (
        lambda: packed(cu_seqlens_k=torch.tensor([0, 7])),
        RuntimeError,
        r"cu_seqlens_q is \[3\] and cu_seqlens_k \[2\]",
    ),
    "packed dtype": (lambda: packed(cu_seqlens_q=torch.tensor([0.0, 2, 5])), RuntimeError, "torch.float32"),
    "packed type": (lambda: packed(cu_seqlens_q=[0, 2, 5]), TypeError, "cu_seqlens_q is of type list"),
    "packed total": (
        lambda: packed(cu_seqlens_q=torch.tensor([0, 2, 4])),
        RuntimeError,
        "end at the 5 rows of query",
    ),
    "packed start": (lambda: packed(cu_seqlens_k=torch.tensor([1, 2, 7])), RuntimeError, "begin at 0"),
    "packed descends": (
        lambda: packed(cu_seqlens_q=torch.tensor([0, 6, 5])),
        RuntimeError,
        "never to descend",
    ),
    "packed longest": (lambda: packed(max_seqlen_k=3), RuntimeError, "max_seqlen_k is 3.*4 long"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named(what):
    build, error, says = MISTAKES[what]
    with pytest.raises(error, match=f"attention: .*{says}") as got, _backend.watch() as seen:
        attention(**build())
    assert got.type is error and not seen


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=pytest.mark.built)])
@pytest.mark.parametrize("side", [2**30, 2**32 - 1, 2**33, 2**63 - 1, 2**80])
def test_a_window_of_any_size(backend, side):
    q = torch.randn(1, 2, 20, 8)
    found = attention(q, q, q, window=(side, 3), backend=backend)
    torch.testing.assert_close(found, attention(q, q, q, window=(None, 3), backend=backend))
    found = attention(q, q, q, window=side, backend=backend)
    torch.testing.assert_close(found, attention(q, q, q, backend=backend))
