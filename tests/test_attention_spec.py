"""The description of attention against torch's own, and its explicit gradient against autograd's."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from seqkern.spec import attention as spec
from seqkern.spec.attention import Tensors
from seqkern.spec.dropout import kept, philox
from seqkern.testing_attention import OPTIONS, PACKED, SHAPES, make_case

LEAVES = ("query", "key", "value", "bias", "alibi_slopes", "sinks")


def with_leaves(case):
    t = case.tensors._replace(
        **{
            name: x.detach().requires_grad_()
            for name in LEAVES
            if (x := getattr(case.tensors, name)) is not None
        }
    )
    return t, [getattr(t, name) for name in LEAVES if getattr(t, name) is not None]


def function_of(t, o):
    """The call as a function of its leaves, for gradcheck."""
    names = [name for name in LEAVES if getattr(t, name) is not None]

    def run(*leaves):
        found = spec.attention(*t._replace(**dict(zip(names, leaves))), *o)
        empty = found[1] == -torch.inf
        return tuple(x for x in (found[0], torch.where(empty, 0.0, found[1]), found[2]) if x is not None)

    return run


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("Dv", [8, 5])
@pytest.mark.parametrize("mask", ["", *SHAPES])
@pytest.mark.parametrize("kind", ["mask", "bias", "causal"])
def test_equals_torch(kind, mask, Dv, gqa):
    if kind == "causal" and mask:
        kind, mask = "bias", mask
    case = make_case(
        torch.float64,
        Hkv=2 if gqa else 4,
        Dv=Dv,
        causal="top-left" if kind == "causal" else "",
        **({kind: mask} if mask else {}),
    )
    t, leaves = with_leaves(case)
    theirs = F.scaled_dot_product_attention(
        *t[:3], attn_mask=t.mask if t.bias is None else t.bias, is_causal=kind == "causal", enable_gqa=gqa
    )
    ours = spec.attention(*t, *case.options)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(x, leaves, case.grads[0]) for x in (ours, theirs))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [(), PACKED])
@pytest.mark.parametrize("options", OPTIONS)
def test_backward_is_autograd(options, lengths):
    case = make_case(torch.float64, lengths=lengths, **OPTIONS[options])
    t, leaves = with_leaves(case)
    output, lse, _ = spec.attention(*t, *case.options)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    want = dict(
        zip(
            [n for n in LEAVES if getattr(t, n) is not None],
            torch.autograd.grad((output, lse), leaves, case.grads),
        )
    )
    found = spec.attention_backward((*case.grads, None), *t, *case.options)._asdict()
    assert {name for name, d in found.items() if d is not None} == want.keys()
    for name, d in want.items():
        torch.testing.assert_close(found[name], d, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weights", ["heads", "mean"])
def test_backward_of_weights_is_autograd(weights):
    case = make_case(torch.float64, weights=weights, **OPTIONS["everything"])
    t, leaves = with_leaves(case)
    output, _, w = spec.attention(*t, *case.options)
    grad_w = torch.randn_like(w)
    want = torch.autograd.grad((output, w), leaves, (case.grads[0], grad_w))
    found = spec.attention_backward((case.grads[0], None, grad_w), *t, *case.options)
    for got, d in zip([d for d in found if d is not None], want):
        torch.testing.assert_close(got, d, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", [(), ((2, 3), (1, 2))])
@pytest.mark.parametrize("options", ["plain", "everything", "sinks in a window", "softcap and bias"])
def test_gradcheck(options, lengths):
    case = make_case(torch.float64, B=2, Hq=2, Hkv=1, L=3, S=3, D=2, lengths=lengths, **OPTIONS[options])
    t, leaves = with_leaves(case)
    run = function_of(t, case.options)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def visible(L, S, causal="", window=(-1, -1)):
    """The window by its definition, one pair at a time."""
    d = 0 if causal == "top-left" else S - L
    left, right = window[0], 0 if causal else window[1]
    shown = torch.zeros(L, S, dtype=torch.bool)
    for i, j in itertools.product(range(L), range(S)):
        shown[i, j] = (left < 0 or j - i - d >= -left) and (right < 0 or j - i - d <= right)
    return shown


@pytest.mark.parametrize(("L", "S"), [(5, 7), (7, 5), (4, 4), (1, 6)])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, 0), (-1, 1), (9, 9)])
@pytest.mark.parametrize("causal", ["", "top-left", "bottom-right"])
def test_band_is_a_mask(causal, window, L, S):
    case = make_case(torch.float64, L=L, S=S, causal=causal, window=window)
    plain = make_case(torch.float64, L=L, S=S)
    t = plain.tensors._replace(mask=visible(L, S, causal, window)[None, None])
    for got, want in zip(
        spec.attention(*case.tensors, *case.options)[:2], spec.attention(*t, *plain.options)[:2]
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("query", "others"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str
)
def test_options_in_another_dtype(query, others):
    case = make_case(torch.float64, alibi=2)
    t = case.tensors._replace(bias=torch.randn(6, 6)[:1, :1].double(), sinks=torch.arange(4.0).double())
    want = spec.attention(*t, *case.options)[0]
    q, k, v = (x.to(query) for x in t[:3])
    t = t._replace(query=q, key=k, value=v, bias=t.bias.to(others), sinks=t.sinks.to(others))
    t = t._replace(alibi_slopes=t.alibi_slopes.to(others))
    output, lse, _ = spec.attention(*t, *case.options)
    assert (output.dtype, lse.dtype) == (query, query)
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-6)


def test_alibi_is_a_bias():
    case = make_case(torch.float64, alibi=2)
    distance = (torch.arange(7) - torch.arange(5)[:, None] - 2).abs()
    bias = -case.tensors.alibi_slopes[..., None, None] * distance
    by_bias = spec.attention(*case.tensors._replace(alibi_slopes=None, bias=bias), *case.options)
    torch.testing.assert_close(by_bias[:2], spec.attention(*case.tensors, *case.options)[:2])


def test_sink_is_a_key_without_a_value():
    case = make_case(torch.float64, sinks=True, softcap=1.0, L=4, S=4)
    t, o = case.tensors, case.options
    scores = o.softcap * torch.tanh(t.query @ t.key.repeat_interleave(2, 1).mT * o.scale / o.softcap)
    joint = torch.cat((scores, t.sinks[None, :, None, None].expand(2, 4, 4, 1)), dim=-1)
    output, lse, _ = spec.attention(*t, *o)
    torch.testing.assert_close(lse, joint.logsumexp(-1))
    torch.testing.assert_close(output, joint.softmax(-1)[..., :-1] @ t.value.repeat_interleave(2, 1))


@pytest.mark.parametrize("options", ["plain", "everything", "causal", "bias, full"])
def test_packed_is_each_sequence_alone(options):
    case = make_case(
        torch.float64, lengths=PACKED, **{k: v for k, v in OPTIONS[options].items() if k != "dropout_p"}
    )
    t, o = case.tensors, case.options
    output, lse, _ = spec.attention(*t, *o)
    at_q = at_k = 0
    for b, (L, S) in enumerate(PACKED):
        alone = Tensors(
            *(x[at : at + n].transpose(0, 1)[None] for x, at, n in zip(t[:3], (at_q, at_k, at_k), (L, S, S))),
            *(None if x is None else x[b : b + 1, :, :L, :S] for x in (t.mask, t.bias)),
            None if t.alibi_slopes is None else t.alibi_slopes[b : b + 1],
            t.sinks,
        )
        want, want_lse, _ = spec.attention(*alone, *o)
        torch.testing.assert_close(output[at_q : at_q + L], want[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, at_q : at_q + L], want_lse[0])
        at_q, at_k = at_q + L, at_k + S


def test_empty_rows():
    case = make_case(torch.float64, mask="full", bias="full")
    mask = case.tensors.mask.clone()
    mask[0, 1, 2] = False
    t, leaves = with_leaves(case)
    t = t._replace(mask=mask)
    output, lse, _ = spec.attention(*t, *case.options)
    assert (output[0, 1, 2] == 0).all() and lse[0, 1, 2] == -torch.inf
    grads = torch.autograd.grad(output.square().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, 1, 2] == 0).all() and (grads[3][0, 1, 2] == 0).all()
    sunk = t._replace(sinks=torch.arange(4.0).double())
    output, lse, _ = spec.attention(*sunk, *case.options)
    assert (output[0, 1, 2] == 0).all() and lse[0, 1, 2] == 1.0


@pytest.mark.parametrize("how", ["mask", "window", "causal"])
def test_what_nobody_sees_may_be_nan(how):
    more = {
        "mask": {"mask": "keys"},
        "window": {"window": (1, 0), "L": 3},
        "causal": {"causal": "top-left", "L": 3},
    }
    case = make_case(torch.float64, **more[how])
    t, o = case.tensors, case.options
    hidden = -1 if how != "window" else 0
    want = spec.attention(*t, *o)[0], *spec.attention_backward((*case.grads, None), *t, *o)[:3]
    for x in (t.key, t.value):
        x[:, :, hidden] = torch.nan
    got = spec.attention(*t, *o)[0], *spec.attention_backward((*case.grads, None), *t, *o)[:3]
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_rounded_once(dtype):
    case = make_case(dtype, **OPTIONS["everything"])
    wide = case.to(torch.float32)
    output, lse, _ = spec.attention(*case.tensors, *case.options)
    want, want_lse, _ = spec.attention(*wide.tensors, *wide.options)
    assert torch.equal(output, want.to(dtype)) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("shape", [{"B": 0}, {"L": 0}, {"S": 0}, {"Hq": 0, "Hkv": 1}])
@pytest.mark.parametrize("options", ["plain", "causal", "sinks", "bias, full"])
def test_empty_sizes(options, shape):
    case = make_case(torch.float64, **shape, **OPTIONS[options])
    t, leaves = with_leaves(case)
    output, lse, _ = spec.attention(*t, *case.options)
    assert output.shape == case.grads[0].shape and (output == 0).all()
    assert lse.shape == case.grads[1].shape
    assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), leaves))


# Known answers of Philox4x32-10: counter, key, result (published with the generator's reference implementation)
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_philox(counter, key, want):
    words = philox(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert tuple(int(w) for w in words) == want


def test_dropout_is_its_definition_and_its_rate():
    seed, batch = torch.tensor([-5]), torch.arange(3)
    keep = kept(seed, 0.25, batch, heads=2, L=40, S=41)
    low, high = int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF
    for b, h, i, j in [(0, 0, 0, 0), (2, 1, 39, 40), (1, 0, 7, 22)]:
        words = philox((torch.tensor(low), torch.tensor(high)), tuple(map(torch.tensor, (b, h, i, j // 4))))
        assert bool(keep[b, h, i, j]) == (int(words[j % 4]) >> 8 >= 0.25 * 2**24)
    assert abs(keep.double().mean().item() - 0.75) < 0.02
    assert not kept(seed, 1.0, batch, 2, 5, 5).any() and kept(seed, 0.0, batch, 2, 5, 5).all()
