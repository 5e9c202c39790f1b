"""Layers without a gradient in few calls: what follows products, torch's results, whom they leave alone."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern.dispatcher import fast_paths
from seqkern.functional import _layer
from seqkern.nn import _whole
from seqkern.ops import _backend
from seqkern.testing import DTYPES, relative_rms, tolerance, worst

pytestmark = [pytest.mark.native, pytest.mark.built]
E, H, FF, B, L = 24, 3, 40, 3, 7
CAUSAL = torch.ones(L, L).triu(1).bool()
PADDING = torch.arange(L) >= torch.tensor([7, 2, 5])[:, None]
CALLS = {
    "plain": {},
    "mask": {"src_mask": CAUSAL},
    "float mask": {"src_mask": torch.zeros(L, L).masked_fill(CAUSAL, -torch.inf)},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
}
S = 5
CROSS = torch.randn(L, S) > 1
FAR = torch.arange(S) >= torch.tensor([5, 1, 3])[:, None]
DECODER_CALLS = {
    "plain": {},
    "causal": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "masks": {"tgt_mask": CAUSAL, "memory_mask": CROSS},
    "float masks": {"tgt_mask": torch.randn(L, L), "memory_mask": torch.randn(L, S)},
    "padding": {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": FAR},
    "causal, padded memory": {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": FAR},
}
ACTIVATIONS = {0: lambda x: x, 1: F.relu, 2: F.gelu}


def ending(y, bias, activation, x, weight, norm_bias, eps):
    """What the op does, in plain torch."""
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    y = y if x is None else x + y
    return y if eps is None else F.layer_norm(y, y.shape[-1:], weight, norm_bias, eps)


def close(got, theirs, exact, layers=1):
    error = relative_rms(got, exact)
    allowed = tolerance(got.dtype, relative_rms(theirs, exact), layers)
    assert got.dtype == theirs.dtype and error <= allowed, (
        f"{error:.3g} > {allowed:.3g} at {worst(got, exact)}"
    )


@pytest.mark.parametrize("normed", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_follows_a_product(isa, dtype, normed):
    for rows, columns in ((1, 1), (5, 7), (2, 16), (3, 33), (300, 130)):
        for has_bias, has_x, affine, activation in itertools.product(*[(False, True)] * 3, (0, 1, 2)):
            if activation == 2 and dtype is torch.float64:
                continue
            y, x = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
            bias, weight, norm_bias = (torch.randn(columns).to(dtype) for _ in range(3))
            call = (bias if has_bias else None, activation, x if has_x else None)
            norm = (weight, norm_bias if has_bias else None) if affine and normed else (None, None)
            call = (*call, *norm, 1e-5 if normed else None)
            exact = ending(y.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in call))
            theirs = ending(y, *call)
            torch.ops.seqkern.ending_(y, *call)
            close(y, theirs, exact)


@pytest.mark.parametrize("columns", [3, 16, 130])
def test_the_norm_of_equal_numbers(isa, columns):
    """Their mean is rounded, and what is left of them must not be taken for a spread."""
    for value in (3.3333, -1e4 / 3, 1e-3):
        y = torch.full((2, columns), value)
        y[1, 0] += abs(value) * 1e-3
        exact = ending(y.double(), None, 0, None, None, None, 1e-5)
        torch.ops.seqkern.ending_(y, None, 0, None, None, None, 1e-5)
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-5 * max(1, abs(value)))
        assert (y[0] == 0).all()


def test_the_op_is_whole():
    op = torch.ops.seqkern.ending_
    y, x, b = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    torch.library.opcheck(op.default, (y, b, 1, x, b, b, 1e-5))
    torch.library.opcheck(op.default, (y, None, 0, None, None, None, None))
    op(y[:0], b, 0, None, None, None, 1e-5)
    strided = torch.randn(10)[::2]
    want = y + strided
    op(y, strided, 0, None, None, None, None)
    assert torch.equal(y, want)
    kept = y.clone()
    for wrong, word in (
        ((y.T, b, 0, None, None, None, None), "contiguous"),
        ((y, b[:4], 0, None, None, None, None), "bias has sizes"),
        ((y, b.double(), 0, None, None, None, None), "dtype"),
        ((y, b, 0, x[:2], None, None, None), "x has sizes"),
        ((y, b, 3, None, None, None, None), "activation"),
        ((y.double(), None, 2, None, None, None, None), "activation"),
        ((y.long(), None, 0, None, None, None, None), "float32"),
    ):
        with pytest.raises(RuntimeError, match=word):
            op(*wrong)
    assert torch.equal(y, kept)


def layers(dtype=torch.float32, kind="Encoder", **options):
    options = {"dim_feedforward": FF, "dtype": dtype} | options
    theirs = getattr(nn, f"Transformer{kind}Layer")(E, H, **options).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours = getattr(seqkern.nn, f"Transformer{kind}Layer")(E, H, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def whole(layer, x, mask=None, padding=None, is_causal=False):
    return _whole.in_few_calls(layer, x, _whole.Hidden(mask, padding, is_causal))


def whole_decoder(layer, x, memory, **masks):
    own = [masks.get(name) for name in ("tgt_mask", "tgt_key_padding_mask")]
    other = [masks.get(name) for name in ("memory_mask", "memory_key_padding_mask")]
    own = _whole.Hidden(*own, masks.get("tgt_is_causal", False))
    return _whole.in_few_calls(layer, x, own, _whole.Memory(memory, _whole.Hidden(*other)))


def in_dtype(masks, dtype):
    return {k: v.to(dtype) if getattr(v, "dtype", None) == torch.float32 else v for k, v in masks.items()}


def in_double(masks):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in masks.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_as_torch(activation, dtype, call):
    masks = in_dtype(CALLS[call], dtype)
    for norm_first, batch_first, bias in itertools.product((False, True), repeat=3):
        options = {
            "norm_first": norm_first,
            "batch_first": batch_first,
            "bias": bias,
            "activation": activation,
        }
        theirs, ours = layers(dtype, **options)
        x = torch.randn(B, L, E).to(dtype)
        x = x if batch_first else x.transpose(0, 1)  # strided, too
        kept = x.clone()
        got = whole(ours, x, masks.get("src_mask"), masks.get("src_key_padding_mask"), "is_causal" in masks)
        if activation == "gelu" and dtype is torch.float64:
            assert got is None
            continue
        assert got is not None and torch.equal(got, ours(x, **masks)) and torch.equal(x, kept)
        want = theirs(x, **masks)
        exact = copy.deepcopy(theirs).double()(x.double(), **in_double(masks))
        assert got.shape == want.shape
        close(got, want, exact, layers=8)


@pytest.mark.parametrize("call", DECODER_CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_a_decoder_layer_as_torch(activation, dtype, call):
    masks = in_dtype(DECODER_CALLS[call], dtype)
    for norm_first, batch_first, bias in itertools.product((False, True), repeat=3):
        options = {"norm_first": norm_first, "batch_first": batch_first, "bias": bias}
        theirs, ours = layers(dtype, "Decoder", activation=activation, **options)
        x, memory = torch.randn(B, L, E).to(dtype), torch.randn(B, S, E).to(dtype)
        x, memory = (t if batch_first else t.transpose(0, 1) for t in (x, memory))
        kept = x.clone(), memory.clone()
        got = whole_decoder(ours, x, memory, **masks)
        if activation == "gelu" and dtype is torch.float64:
            assert got is None
            continue
        assert got is not None and torch.equal(got, ours(x, memory, **masks))
        assert torch.equal(x, kept[0]) and torch.equal(memory, kept[1])
        want = theirs(x, memory, **masks)
        exact = copy.deepcopy(theirs).double()(x.double(), memory.double(), **in_double(masks))
        assert got.shape == want.shape
        close(got, want, exact, layers=12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # torch's
@torch.no_grad()
def test_what_a_decoder_layer_leaves_to_its_modules():
    x, memory = torch.randn(L, B, E), torch.randn(S, B, E)
    _, layer = layers(kind="Decoder")
    assert whole_decoder(layer, x, memory) is not None
    for wrong in (
        memory[0],
        memory[:0],
        memory[:, :1],
        memory.double(),
        memory[..., 1:],
        memory.to_sparse(),
        nn.Parameter(memory.clone()),
        torch.nested.nested_tensor(list(memory)),
    ):
        # A parameter is a plain tensor where no gradient is asked for.
        assert (whole_decoder(layer, x, wrong) is None) == (type(wrong) is not nn.Parameter)
    assert whole_decoder(layer, x, memory, memory_mask=CROSS, memory_key_padding_mask=FAR) is None
    assert whole(layer, x) is None  # without a memory
    for name in ("multihead_attn", "norm3", "dropout3", "multihead_attn.out_proj"):
        _, layer = layers(kind="Decoder")
        layer.get_submodule(name).register_forward_hook(lambda module, args, output: None)
        assert (whole_decoder(layer, x, memory) is None) == (name != "multihead_attn.out_proj")
    for change in (
        lambda layer: layer.multihead_attn.train(),
        lambda layer: layer.multihead_attn.double(),
        lambda layer: setattr(layer.multihead_attn, "batch_first", True),
        lambda layer: setattr(layer, "_mha_block", lambda x, *_: x),
        lambda layer: setattr(layer, "norm3", nn.Identity()),
        lambda layer: setattr(layer, "multihead_attn", seqkern.nn.MultiheadAttention(E, H, kdim=5).eval()),
        lambda layer: parametrize.register_parametrization(
            layer.multihead_attn, "in_proj_weight", nn.Identity()
        ),
    ):
        _, layer = layers(kind="Decoder")
        change(layer)
        assert whole_decoder(layer, x, memory) is None
    _, layer = layers()
    layer.norm3 = nn.LayerNorm(E)  # which nobody calls
    got = whole(layer, x)
    del layer.norm3
    assert torch.equal(got, whole(layer, x))
    _, layer = layers(kind="Decoder")
    del layer.multihead_attn
    with pytest.raises(AttributeError):
        layer(x, memory)
    _, layer = layers(kind="Decoder")
    layer.multihead_attn = seqkern.nn.MultiheadAttention(E, 2).eval()  # of other heads
    torch.testing.assert_close(
        whole_decoder(layer, x, memory), super(type(layer), layer).forward(x, memory), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_wrong_masks_of_a_decoder_layer_are_told_before_anything_is_computed(monkeypatch):
    _, layer = layers(kind="Decoder")
    for owner, name in ((_layer, "in_few_calls"), (seqkern.nn.MultiheadAttention, "forward")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("computed"))
    x, memory = torch.randn(L, B, E), torch.randn(S, B, E)
    for masks, kind in (
        ({"memory_mask": CROSS.T}, RuntimeError),
        ({"memory_key_padding_mask": FAR[:, 1:]}, AssertionError),
        ({"memory_is_causal": True}, RuntimeError),
        ({"tgt_mask": CROSS}, RuntimeError),
    ):
        with pytest.raises(kind, match="MultiheadAttention"):
            layer(x, memory, **masks)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(seqkern.nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) + 1


def with_hook(name):
    def change(layer):
        layer.get_submodule(name).register_forward_hook(lambda module, args, output: None)

    return change


def with_own(name):
    def change(layer):
        setattr(layer, name, lambda *args, **kwargs: args[0])

    return change


def as_function(layer, name):
    delattr(layer, name)
    object.__setattr__(layer, name, lambda x: 2 * x)


CHANGES = {
    "hook on self_attn": with_hook("self_attn"),
    "hook on linear1": with_hook("linear1"),
    "hook on norm2": with_hook("norm2"),
    "_ff_block": with_own("_ff_block"),
    "_sa_block": with_own("_sa_block"),
    "attention that trains": lambda layer: layer.self_attn.train(),
    "dropout that trains": lambda layer: layer.dropout1.train(),
    "class of its own": lambda layer: object.__setattr__(layer, "__class__", Own),
    "keys of its own": lambda layer: setattr(
        layer, "self_attn", seqkern.nn.MultiheadAttention(E, H, add_zero_attn=True).eval()
    ),
    "norm of its own": lambda layer: setattr(layer, "norm1", nn.Identity()),
    "activation": lambda layer: setattr(layer, "activation", torch.tanh),
    "mixed dtypes": lambda layer: layer.linear1.half(),
    "norms in float64": lambda layer: layer.norm1.double(),
    "sizes that broadcast": lambda layer: setattr(layer, "linear2", nn.Linear(FF, 1).eval()),
    "sparse weights": lambda layer: setattr(
        layer.linear1, "weight", nn.Parameter(layer.linear1.weight.to_sparse())
    ),
    "a function for a norm": lambda layer: as_function(layer, "norm1"),
    "a function for a dropout": lambda layer: as_function(layer, "dropout1"),
    "a mixer for an attention": lambda layer: (as_function(layer, "self_attn"), with_own("_sa_block")(layer)),
    "parametrized": lambda layer: parametrize.register_parametrization(
        layer.linear1, "weight", nn.Identity()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_layer_runs_its_modules(change):
    _, layer = layers()
    x = torch.randn(L, B, E)
    assert whole(layer, x) is not None
    CHANGES[change](layer)
    assert whole(layer, x) is None


def test_a_layer_of_our_products_as_torch(monkeypatch):
    """Where torch's matmul is the slower one, each product brings its bias and activation."""
    monkeypatch.setattr(_backend, "torch_outruns", lambda op, tensors: None)
    for dtype, norm_first in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        theirs, ours = layers(dtype, norm_first=norm_first, activation="gelu")
        x = torch.randn(L, B, E).to(dtype)
        with torch.no_grad():
            got = whole(ours, x)
            assert got is not None
            close(got, theirs(x), copy.deepcopy(theirs).double()(x.double()), layers=8)


@pytest.mark.parametrize("layout", ["expanded", "one of one", "every other feature", "a part of wider rows"])
@torch.no_grad()
def test_any_layout(layout):
    _, layer = layers()
    x = {
        "expanded": torch.randn(1, B, E).expand(L, -1, -1),
        "one of one": torch.randn(1, 1, E),
        "every other feature": torch.randn(L, B, 2 * E)[..., ::2],
        "a part of wider rows": torch.randn(L, B, 2 * E)[..., 3 : E + 3],
    }[layout]
    got = whole(layer, x)
    assert torch.equal(got, whole(layer, x.contiguous()))


def test_the_result_may_be_written_to_with_a_gradient():
    _, layer = layers()
    more = torch.ones(E, requires_grad=True)
    with torch.no_grad():
        output = layer(torch.randn(L, B, E))
    output += more
    output.sum().backward()
    assert torch.equal(more.grad, torch.full((E,), float(L * B)))


def test_float16_sums_its_bias_before_it_rounds():
    _, layer = layers(torch.float16, norm_first=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.norm2.bias.fill_(100)
        layer.linear1.weight.fill_(29.17)  # 24 products of 100 with it are 70000, more than any float16
        layer.linear1.bias.fill_(-10000)
        assert layer(torch.zeros(L, B, E, dtype=torch.float16)).isfinite().all()


def test_where_somebody_looks_on():
    _, layer = layers()
    x = torch.randn(L, B, E)

    def taken(x=x, mask=None, padding=None):
        return whole(layer, x, mask, padding) is not None

    assert not taken()  # the parameters take gradients
    with torch.no_grad():
        assert taken() and taken(mask=CAUSAL) and not taken(mask=CAUSAL, padding=PADDING)
        assert not taken(x[0]) and not taken(x[:0]) and not taken(x.double()) and not taken(x[..., 1:])
        for name in ("reference", "torch", "cpu"):
            with seqkern.backend(name):
                assert not taken()
        with _backend.watch():
            assert not taken()
        with Functions():
            assert not taken()
        with torch.autograd.forward_ad.dual_level():
            assert not taken()
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
        assert not taken()
        handle.remove()
        assert taken()

        def traced(x):
            assert not taken()
            return x + 1

        torch.jit.trace(traced, x, check_trace=False)
        with torch.autocast("cpu", torch.bfloat16), seqkern.backend(None):
            assert not taken()
        with Mode():
            assert not taken()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert not taken()
        torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], layer(x))
    with torch.inference_mode():
        assert taken()


@torch.no_grad()
def test_errors_are_those_of_the_modules():
    _, layer = layers()
    x = torch.randn(L, B, E)
    for call, kind, word in (
        ({"src_mask": CAUSAL[1:]}, RuntimeError, "attn_mask is"),
        ({"src_mask": CAUSAL.long()}, AssertionError, "expected bool"),
        ({"src_key_padding_mask": PADDING.T}, AssertionError, "key_padding_mask is"),
        ({"is_causal": True}, RuntimeError, "is_causal is given without attn_mask"),
    ):
        with pytest.raises(kind, match=word):
            layer(x, **call)


@torch.no_grad()
def test_norms_of_another_dtype_behind_enable(monkeypatch):
    """As torch's native path takes them on a CPU."""
    monkeypatch.setattr(fast_paths, "WORTH_A_LAYER", 0)
    theirs, _ = layers(torch.bfloat16, batch_first=True)
    theirs.norm1.float(), theirs.norm2.float()
    x = torch.randn(B, L, E).bfloat16()
    want = theirs(x)
    seqkern.enable()
    try:
        got = theirs(x)
    finally:
        seqkern.disable()
    close(got, want, copy.deepcopy(theirs).double()(x.double()), layers=8)
