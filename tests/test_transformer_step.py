"""seqkern::transformer_step, a layer's decoding step in one call: what torch's layer gives, and where it runs."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import seqkern
from seqkern.nn import KVCache, MultiheadAttention, _step
from seqkern.ops._linear_backends import few_rows
from seqkern.testing import DTYPES, on_threads, poison, relative_rms, tolerance, worst

pytestmark = [
    pytest.mark.built,
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"),
]
S, STEPS = 5, 6
SIZES = [(1, 16, 2, 24), (2, 20, 2, 13), (3, 33, 3, 40), (16, 8, 8, 3), (7, 64, 2, 130)]  # B, E, heads, F
KINDS = list(itertools.product(("Encoder", "Decoder"), (False, True), ("relu", "gelu")))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the op."""
    made, op = [], _step.op

    def counted(x, *rest):
        made.append(x.shape)
        poison(torch.empty_like(x))  # the output's memory, if the allocator gives it out again
        return op(x, *rest)

    monkeypatch.setattr(_step, "op", counted)
    return made


def stack(kind, E=16, H=2, F=24, dtype=torch.float64, layers=2, **options):
    """torch's stack in eval mode, with weights that move things."""
    layer = getattr(nn, f"Transformer{kind}Layer")(E, H, F, dropout=0.0, batch_first=True, **options)
    made = getattr(nn, f"Transformer{kind}")(layer, layers).to(dtype).eval()
    for p in made.parameters():
        nn.init.normal_(p, std=E**-0.5 if p.dim() > 1 else 0.3)
    return made


def ours_of(theirs):
    return seqkern.accelerate(copy.deepcopy(theirs))


def stepped(ours, x, memory=(), padding=None, **options):
    """All positions of x [B, n, E], one by one; ``padding`` hides some."""
    cache, found = KVCache(), []
    word = "src" if isinstance(ours, nn.TransformerEncoder) else "tgt"
    for i in range(x.shape[1]):
        hidden = {} if padding is None else {f"{word}_key_padding_mask": padding[:, i : i + 1]}
        found.append(ours.step(x[:, i : i + 1], *memory, cache, **hidden, **options))
    return torch.cat(found, dim=1)


def whole(theirs, x, memory=(), padding=None, **options):
    """The same by one pass of torch's layers, not its native path."""
    mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    word = "src" if isinstance(theirs, nn.TransformerEncoder) else "tgt"
    hidden = {} if padding is None else {f"{word}_key_padding_mask": padding}
    with torch.enable_grad():
        return theirs(x, *memory, mask, **hidden, **options).detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "norm_first", "activation"), KINDS)
@torch.no_grad()
def test_as_torch(isa, calls, kind, norm_first, activation, dtype):
    for i, (B, E, H, F) in enumerate(SIZES):
        calls.clear()
        B, bias = min(B, few_rows(dtype)), (i + norm_first) % 2 == 0
        theirs = stack(kind, E, H, F, norm_first=norm_first, activation=activation, bias=bias).to(dtype)
        x = torch.randn(B, STEPS, E, dtype=dtype)
        memory = (torch.randn(B, S, E, dtype=dtype),) if kind == "Decoder" else ()
        got = stepped(ours_of(theirs), x, memory)
        in_one = not (activation == "gelu" and dtype is torch.float64)
        assert len(calls) == (2 * STEPS if in_one else 0)
        torchs = whole(theirs, x, memory)
        exact = whole(theirs.double(), x.double(), [m.double() for m in memory])
        error, allowed = relative_rms(got, exact), tolerance(dtype, relative_rms(torchs, exact), layers=2)
        assert error <= allowed, f"{error:.3g} > {allowed:.3g} at {worst(got, exact)} of {(B, E, H, F, bias)}"


@pytest.mark.parametrize("of_memory", ["bool", "float", None], ids=str)
@torch.no_grad()
def test_hidden_positions(isa, calls, of_memory):
    """Of the sequences and of the memory; what is hidden may be anything."""
    theirs = stack("Decoder", 20, 2, 13)
    x, memory = torch.randn(3, STEPS, 20).double(), torch.randn(3, S, 20).double()
    padding = torch.zeros(3, STEPS, dtype=torch.bool)
    padding[1, :2], padding[2, 3] = True, True
    hidden, options = torch.arange(S) >= torch.tensor([5, 2, 4])[:, None], {}
    if of_memory:
        floats = torch.zeros(3, S).double().masked_fill(hidden, -torch.inf)
        options["memory_key_padding_mask"] = hidden if of_memory == "bool" else floats
    want = whole(theirs, x, (memory,), padding, **options)
    strange = memory.masked_fill(hidden[..., None], torch.nan) if of_memory == "bool" else memory
    got = stepped(ours_of(theirs), x, (strange,), padding, **options)
    assert len(calls) == 2 * STEPS
    keep = ~padding
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_no_thread_count_changes_a_bit(isa):
    theirs = stack("Decoder", 96, 4, 200, torch.float32)
    ours, x, memory = ours_of(theirs), torch.randn(5, STEPS, 96), (torch.randn(5, 2100, 96),)
    found = on_threads(lambda: stepped(ours, x, memory))
    assert all(torch.equal(found[0], other) for other in found)
    alone = stepped(ours, x[2:3], (memory[0][2:3],))
    torch.testing.assert_close(alone, found[0][2:3], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_long_sequences_split_their_keys(isa):
    theirs = stack("Encoder", 16, 2, 24, layers=1)
    ours, x = ours_of(theirs), torch.randn(1, 2101, 16).double()
    cache = KVCache()
    ours.step(x[:, :-1], cache)
    got = ours.step(x[:, -1:], cache)
    torch.testing.assert_close(got, whole(theirs, x)[:, -1:], rtol=1e-11, atol=1e-11)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked(layer):
    layer.linear1.register_forward_hook(lambda module, args, output: 2 * output)


def replaced(layer):
    layer.linear2.__class__ = Scaled


def of_own_attention(layer):
    layer.self_attn.__class__ = type("Mine", (MultiheadAttention,), {})


def of_own_class(layer):
    layer.__class__ = type("Mine", (type(layer),), {})


def parametrized(layer):
    torch.nn.utils.parametrizations.weight_norm(layer.linear1)


def pruned(layer):
    prune.random_unstructured(layer.self_attn, "in_proj_bias", 0.5)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized_projection(layer):
    parametrize.register_parametrization(layer.self_attn.out_proj, "bias", Doubled())


def with_a_buffer_for_a_bias(layer):
    bias = layer.linear1.bias.detach()
    del layer.linear1.bias
    layer.linear1.register_buffer("bias", bias)


def sparse(layer):
    layer.linear1.weight = nn.Parameter(layer.linear1.weight.to_sparse_csr())


def own_feed_forward(layer):
    layer._ff_block = lambda x: -x


def with_a_function_for_a_dropout(layer):
    del layer.dropout1
    layer.dropout1 = lambda x: 2 * x


def with_another_activation(layer):
    layer.activation = torch.tanh


def norm_of_another_kind(layer):
    layer.norm2 = nn.RMSNorm(16).double()


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced,
        of_own_attention,
        of_own_class,
        parametrized,
        pruned,
        parametrized_projection,
        with_a_buffer_for_a_bias,
        sparse,
        own_feed_forward,
        with_a_function_for_a_dropout,
        with_another_activation,
        norm_of_another_kind,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@torch.no_grad()
def test_layers_of_another_kind_are_stepped_by_their_parts(calls, change):
    ours, x = ours_of(stack("Encoder", layers=1)), torch.randn(2, 3, 16).double()
    change(ours.layers[0])
    got = stepped(ours, x)
    assert not calls
    mask = torch.ones(3, 3).triu(1).bool()
    torch.testing.assert_close(got, ours(x, mask, is_causal=True), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_mixed_dtypes_and_numbers_of_heads_go_by_parts(calls):
    ours = ours_of(stack("Encoder", dtype=torch.bfloat16, layers=1))
    ours.layers[0].norm1.float(), ours.layers[0].norm2.float()
    assert stepped(ours, torch.randn(2, 2, 16).bfloat16()).dtype is torch.bfloat16
    ours = ours_of(stack("Decoder", layers=1))
    ours.layers[0].multihead_attn = MultiheadAttention(16, 4, batch_first=True).double().eval()
    x, memory = torch.randn(2, 3, 16).double(), torch.randn(2, S, 16).double()
    got = stepped(ours, x, (memory,))
    assert not calls
    torch.testing.assert_close(got, whole(ours, x, (memory,)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_an_empty_memory_is_a_memory(isa, calls, monkeypatch, norm_first):
    """Its attention gives the bias of its projection."""
    ours = ours_of(stack("Decoder", norm_first=norm_first))
    x, memory = torch.randn(2, 3, 16).double(), torch.randn(2, 0, 16).double()
    got = stepped(ours, x, (memory,))
    assert calls
    monkeypatch.setattr(seqkern.nn._step, "may_be_one_call", lambda _: False)
    torch.testing.assert_close(got, stepped(ours, x, (memory,)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["reference", "torch"])
@torch.no_grad()
def test_another_backend_may_be_forced(calls, name):
    ours, x = ours_of(stack("Encoder")), torch.randn(2, 3, 16).double()
    with seqkern.backend(name):
        got = stepped(ours, x)
    assert not calls
    torch.testing.assert_close(got, stepped(ours, x), rtol=1e-11, atol=1e-11)
    assert len(calls) == 6


@torch.no_grad()
def test_a_layer_that_goes_by_parts_may_change_those_behind_it(calls):
    theirs = stack("Encoder", layers=4)
    ours, x = ours_of(theirs), torch.randn(2, 3, 16).double()
    other = nn.Parameter(torch.randn_like(theirs.layers[2].linear1.weight))

    def change(*_):
        ours.layers[2].linear1.weight = other

    ours.layers[1].linear1.register_forward_hook(change)
    got = stepped(ours, x)
    theirs.layers[2].linear1.weight = other
    torch.testing.assert_close(got, whole(theirs, x), rtol=1e-11, atol=1e-11)
    assert len(calls) == 3 * 3  # all layers but one


@torch.no_grad()
def test_many_sequences_and_several_positions_go_by_parts(calls):
    ours = ours_of(stack("Encoder"))
    stepped(ours, torch.randn(17, 2, 16).double())
    ours.step(torch.randn(2, 3, 16).double(), KVCache())
    with torch.autocast("cpu", torch.bfloat16):
        stepped(ours.float(), torch.randn(2, 2, 16))
    assert not calls


def test_parameters_that_want_a_gradient_get_none(calls):
    assert not stepped(ours_of(stack("Encoder")), torch.randn(2, 2, 16).double()).requires_grad
    assert len(calls) == 4


def arguments(B=2, E=8, H=2, F=12, capacity=4, length=1, memory=True, dtype=torch.float32):
    """What the op takes, by name."""
    parts = [(3 * E, E), (3 * E,), (E, E), (E,), (E,), (E,)] * (1 + memory)
    weights = [torch.randn(size, dtype=dtype) for size in (*parts, (F, E), (F,), (E, F), (E,), (E,), (E,))]
    return {
        "x": torch.randn(B, E, dtype=dtype),
        "own": torch.randn(B, 2, H, capacity, E // H, dtype=dtype),
        "length": length,
        "own_mask": torch.ones(B, 1, 1, length + 1, dtype=torch.bool),
        "memory_keys": torch.randn(B, H, 3, E // H, dtype=dtype) if memory else None,
        "memory_values": torch.randn(B, H, 3, E // H, dtype=dtype) if memory else None,
        "memory_mask": None,
        "memory_bias": torch.randn(B, 1, 1, 3, dtype=dtype) if memory else None,
        "weights": weights,
        "norm_first": True,
        "activation": 1,
        "eps": [1e-5] * (2 + memory),
    }


@pytest.mark.parametrize("memory", [False, True])
def test_opcheck(memory):
    torch.library.opcheck(
        torch.ops.seqkern.transformer_step.default, tuple(arguments(memory=memory).values())
    )


def test_layouts():
    """What does not lie plain gives what its plain copy gives; only the next position is written."""
    given = arguments()
    strange = given | {
        "x": given["x"].T.contiguous().T,
        "own": given["own"].repeat_interleave(2, dim=3)[:, :, :, ::2],
        "own_mask": given["own_mask"].repeat(1, 1, 1, 2)[..., : given["length"] + 1],
        "memory_keys": given["memory_keys"].transpose(1, 2).contiguous().transpose(1, 2),
        "weights": [
            w.T.contiguous().T if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in given["weights"]
        ],
    }
    before = given["own"].clone()
    want = torch.ops.seqkern.transformer_step(*given.values())
    assert torch.equal(torch.ops.seqkern.transformer_step(*strange.values()), want)
    assert torch.equal(strange["own"], given["own"])
    written = (given["own"] != before).any(-1).any(1).any(1)
    assert written.tolist() == [[False, True, False, False]] * 2


BAD = {
    "x has sizes": {"x": torch.randn(2, 1, 8)},
    "x has 17 rows, expected at most 16": {"x": torch.randn(17, 8)},
    "own has sizes": {"own": torch.randn(3, 2, 2, 4, 4)},
    "of 8 features": {"own": torch.randn(2, 2, 2, 4, 3)},
    "length is 4, expected less than own's capacity 4": {"length": 4},
    "own_mask is not of bool": {"own_mask": torch.ones(2, 1, 1, 2)},
    "own_mask has sizes": {"own_mask": torch.ones(2, 1, 1, 3, dtype=torch.bool)},
    "the memory has sizes": {"memory_keys": torch.randn(2, 2, 3, 5)},
    "memory_keys come without memory_values": {"memory_values": None},
    "memory_bias has another dtype": {"memory_bias": torch.randn(2, 1, 1, 3).half()},
    "there are 12 weights and 3 eps, expected 18 and 3": {"weights": arguments(memory=False)["weights"]},
    "a weight has sizes": {"weights": arguments(F=9)["weights"][:14] + arguments()["weights"][14:]},
    "a weight has another dtype": {"weights": [w.double() for w in arguments()["weights"]]},
    "activation is 0": {"activation": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_of_the_op(message):
    given = arguments() | BAD[message]
    before = given["own"].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.seqkern.transformer_step(*given.values())
    assert torch.equal(given["own"], before)
