"""The short way of attention without options, on a CPU and without a gradient, through both doors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from seqkern.functional import attention, scaled_dot_product_attention
from seqkern.ops import _backend


def long_way(call):
    with _backend.watch():  # which closes the short one
        return call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("query", "key", "size"),
    [
        ((1, 2, 9, 8), (1, 2, 20, 8), 8),
        ((2, 8, 1, 64), (2, 8, 3000, 64), 64),
        ((2, 8, 1, 64), (2, 2, 3000, 64), 48),
        ((1, 4, 300, 64), (1, 4, 500, 64), 64),
    ],
)
def test_the_short_way_is_the_long_one(query, key, size, dtype):
    q, k, v = (torch.randn(shape).to(dtype) for shape in (query, key, (*key[:3], size)))
    for causal, scale in ((False, None), (True, 0.3)):
        for call in (
            partial(attention, q, k, v, causal=causal, scale=scale),
            partial(scaled_dot_product_attention, q, k, v, None, 0.0, causal, scale, enable_gqa=True),
        ):
            assert torch.equal(call(), long_way(call))


@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
def test_the_short_way_with_a_mask(kind):
    q, k, v = (torch.randn(2, 4, n, 16) for n in (20, 50, 50))
    mask = torch.randn(2, 1, 20, 50) if kind == "float" else torch.rand(2, 1, 20, 50) < 0.5
    mask = mask[:, :, :1] if kind == "keys" else mask
    calls = [partial(scaled_dot_product_attention, q, k, v, mask)]
    calls += [] if kind == "float" else [partial(attention, q, k, v, mask=mask)]
    for call in calls:
        assert torch.equal(call(), long_way(call))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, :1], v),
        lambda q, k, v: (q, k[..., :4], v),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k, v.double()),
        lambda q, k, v: (q.half(), k, v),
        lambda q, k, v: (q.long(), k.long(), v.long()),
        lambda q, k, v: (q[0], k[0], v[0]),
        lambda q, k, v: (q[:, :0], k, v),
        lambda q, k, v: (q, k[:, :0], v[:, :0]),
        lambda q, k, v: (q[..., :0], k[..., :0], v),
        lambda q, k, v: (q, k, v[..., :0]),
        lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (q[:, :, :0], k, v),
        lambda q, k, v: (q[:0], k[:0], v[:0]),
        lambda q, k, v: (q.to_sparse(), k, v),
        lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
        lambda q, k, v: (q.to("meta"), k, v),
        lambda q, k, v: (q, k, v.to("meta")),
        lambda q, k, v: (torch.nn.Parameter(q), k, v),
        lambda q, k, v: (q, None, v),
        lambda q, k, v: (q.mT.contiguous().mT, k[..., 0:1].expand_as(k), v),
    ],
)
def test_what_the_short_way_passes_on(change, large):
    """Results, errors and their words are those of the long way."""
    size = 600 if large else 3
    q, k, v = change(*(torch.randn(2, 2, size, 64) for _ in range(3)))

    def outcome(call):
        try:
            return call()
        except Exception as e:
            return type(e), str(e)

    for call in (partial(attention, q, k, v), partial(scaled_dot_product_attention, q, k, v)):
        short, long = outcome(call), outcome(partial(long_way, call))
        if isinstance(short, torch.Tensor):
            assert short.requires_grad == long.requires_grad and short.device == long.device
            assert short.is_meta or torch.allclose(
                short, long, rtol=1e-5, atol=1e-6
            )  # few keys: another order
        else:
            assert short == long


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.no_grad
def test_nested_tensors_are_torchs():
    x = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)]).transpose(1, 2)
    said = []
    for f in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with pytest.raises(RuntimeError) as caught:
            f(x, x, x)  # not contiguous, which torch wants of them
        said.append(str(caught.value))
    assert said[0] == said[1]
    x = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    parts = (f(x, x, x).unbind() for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert all(torch.equal(got, want) for got, want in zip(*parts))


def test_autocast_casts_on_the_short_way():
    q, k, v = (torch.randn(1, 4, n, 64) for n in (1, 1000, 1000))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for door in (scaled_dot_product_attention, attention):
            call = partial(door, q, k, v)
            assert call().dtype is torch.bfloat16 and torch.equal(call(), long_way(call))


@torch.no_grad
def test_what_follows_plain_tensors_sees_them():
    q = torch.randn(2, 2, 9, 8)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        attention(q, q, q)
    assert torch.ops.seqkern.attention.default in seen
    stacked = torch.func.vmap(scaled_dot_product_attention)(q[None], q[None], q[None])
    torch.testing.assert_close(stacked[0], attention(q, q, q))
    with forward_ad.dual_level():
        found = attention(forward_ad.make_dual(q, torch.ones_like(q)), q, q)
        assert forward_ad.unpack_dual(found).tangent is not None


@pytest.mark.parametrize("dropout_p", [None, "0", [0.0], torch.zeros(2)])
def test_what_is_no_probability_is_left_to_torch(dropout_p):
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    for way in (lambda call: call(), long_way):
        with pytest.raises(TypeError, match="dropout_p"):
            way(partial(scaled_dot_product_attention, q, k, v, None, dropout_p))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": torch.tensor(0.3, requires_grad=True)},  # which would have no gradient
        {"scale": "0.3"},
        {"is_causal": "none"},
        {"is_causal": 1},
        {"is_causal": None},
        {"enable_gqa": 1},
    ],
    ids=str,
)
def test_what_is_no_number_or_flag_is_left_to_torch(options):
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    for way in (lambda call: call(), long_way):
        with pytest.raises(TypeError, match=next(iter(options))):
            way(partial(scaled_dot_product_attention, q, k, v, **options))


def test_numbers_of_another_library():
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    number = torch.tensor(0.25).numpy()[()]
    found = scaled_dot_product_attention(q, k, v, scale=number)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, scale=0.25))


@pytest.mark.usefixtures("fresh_compiler")
def test_causal_by_a_size_that_changes():
    call = torch.compile(
        lambda q: attention(q, q, q, causal=q.shape[2] > 4), fullgraph=True, dynamic=True, backend="eager"
    )
    for length in (5, 7, 3):
        q = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(call(q), attention(q, q, q, causal=length > 4))


@pytest.mark.parametrize("size", [3, 600])
def test_keys_and_values_of_two_lengths(size):
    """torch's own kernel reads past the end of the shorter."""
    q, k, v = (torch.randn(2, 2, size, 64) for _ in range(3))
    with pytest.raises(RuntimeError, match="all sizes but the last to agree"):
        attention(q, k[:, :, 1:], v)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": torch.tensor(1.0, requires_grad=True)},
        {"dropout_p": "0"},
        {"return_weights": None},
        {"dropout_seed": 3},
        {"max_seqlen_q": 3},
        {"causal": "left"},
        {"scale": "1"},
        {"backend": "none"},
    ],
)
def test_the_short_way_lets_no_wrong_option_pass(options):
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        attention(q, k, v, **options)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("door", [attention, scaled_dot_product_attention])
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_records_the_op_that_knows_gradients(door, grad):
    q = torch.randn(2, 2, 9, 8)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(lambda q: door(q, q, q) + 1, (q.requires_grad_(grad),))
        assert "seqkern::attention" in str(traced.graph)
        other = torch.randn(2, 2, 9, 8, requires_grad=grad)
        torch.testing.assert_close(traced(other), door(other, other, other) + 1)


def test_batched_gradients_of_gradients():
    """torch's older vmap, of is_grads_batched, reaches the backwards' ops in wrappers."""
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.double) for _ in range(3))
    found = []
    for door in (scaled_dot_product_attention, math_attention):
        p = q.clone().requires_grad_()
        y = door(p, k, v)
        units = torch.eye(24, dtype=torch.double).view(24, 1, 2, 3, 4)
        (J,) = torch.autograd.grad(y, p, units, is_grads_batched=True, create_graph=True)
        found.append(torch.autograd.grad(y.sum() + J.pow(2).sum(), p)[0])
    torch.testing.assert_close(*found)


def math_attention(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


@pytest.mark.parametrize("door", [attention, scaled_dot_product_attention])
def test_gradients_enabled_below_autograd_make_no_graph(door):
    q = torch.randn(2, 2, 9, 8, requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        assert not door(q, q, q).requires_grad
    with torch._C._AutoDispatchBelowAutograd():
        assert not door(q, q, q).requires_grad


@torch.no_grad
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("within", [False, True])
def test_the_output_lies_as_torchs(rank, within):
    shape = (2, 9, 4, 8) if within else (2, 4, 9, 8)
    q = torch.randn(shape[4 - rank :])
    q = q.transpose(-2, -3) if within and rank > 2 else q
    got, want = (f(q, q, q) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert got.stride() == (want.stride() if rank == 4 else want.contiguous().stride())
