"""Steps on a KVCache and generate: equal to torch's decoding that computes every position anew."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import seqkern
from seqkern.nn import KVCache
from seqkern.nn.generation import choose_token
from seqkern.ops import _backend

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"
)
E, H, FF, V, S = 16, 2, 24, 19, 6
SWITCHES = [
    {"norm_first": norm_first, "batch_first": batch_first, "bias": norm_first != batch_first}
    for norm_first, batch_first in itertools.product((False, True), repeat=2)
]
PADDING = torch.arange(S) >= torch.tensor([6, 2, 4])[:, None]


class Words(nn.Module):
    """Token and position embeddings and the scores, all from random tables that make answers vary."""

    def __init__(self, dtype):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, E, dtype=dtype), nn.Embedding(64, E, dtype=dtype)
        self.head = nn.Linear(E, V, dtype=dtype)
        self.requires_grad_(False)

    def embed(self, tokens, positions):
        return self.tokens(tokens) + self.places(positions)


def made(kind, dtype=torch.float32, layers=2, norm=True, **options):
    """torch's stack in eval mode, ours with its weights, and the words around them."""
    layer = getattr(nn, f"Transformer{kind}Layer")(E, H, FF, dtype=dtype, **options)
    theirs = getattr(nn, f"Transformer{kind}")(
        layer, layers, nn.LayerNorm(E, dtype=dtype) if norm else None
    ).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = seqkern.accelerate(getattr(nn, f"Transformer{kind}")(layer, layers, theirs.norm)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, Words(dtype)


def arranged(x, stack):
    """[B, n, E] in the layout of the stack."""
    return x if stack.layers[0].self_attn.batch_first else x.transpose(0, 1)


@torch.no_grad()
def uncached(theirs, words, prompt, length, memory, padding, count, eos=()):
    """Greedy tokens of one sequence, each from a whole pass of torch's stack."""
    tokens = prompt[:length].tolist()
    for _ in range(count):
        at = torch.arange(len(tokens))
        x = arranged(words.embed(torch.tensor([tokens]), at[None]), theirs)
        mask = nn.Transformer.generate_square_subsequent_mask(len(tokens), dtype=x.dtype)
        if memory is None:
            found = theirs(x, mask)
        else:
            found = theirs(x, arranged(memory[None], theirs), mask, memory_key_padding_mask=padding)
        tokens.append(int(words.head(arranged(found, theirs)[:, -1]).argmax()))
        if tokens[-1] in eos:
            break
    return tokens


def prompts(lengths):
    tokens = torch.randint(V, (len(lengths), max(lengths)))
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], 0)


# The choice as it is, and our kernels even where a call this small would go to torch.
@pytest.fixture(params=[None, pytest.param("cpu", marks=pytest.mark.built)])
def backend(request):
    with seqkern.backend(request.param):
        yield


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lengths", [(1, 1, 1), (4, 4, 4), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("padded", ["no padding", "bool", "float"])
@pytest.mark.parametrize("options", SWITCHES, ids=lambda o: "-".join(map(str, o.values())))
def test_decoder_is_token_for_token_torch(options, padded, lengths):
    dtype = torch.float64 if padded == "no padding" else torch.float32
    theirs, ours, words = made("Decoder", dtype, norm=lengths[0] == 1, **options)
    prompt, memory = prompts(lengths), torch.randn(3, S, E, dtype=dtype)
    padding = None if padded == "no padding" else PADDING
    if padded == "float":
        padding = torch.zeros(PADDING.shape, dtype=dtype).masked_fill(PADDING, -torch.inf)
    found = ours.generate(
        prompt,
        arranged(memory, ours),
        embed=words.embed,
        logits=words.head,
        max_new_tokens=9,
        lengths=torch.tensor(lengths),
        memory_key_padding_mask=padding,
        pad=V,
    )
    assert found.lengths.tolist() == [n + 9 for n in lengths]
    for i, n in enumerate(lengths):
        hidden = None if padding is None else padding[i : i + 1]
        want = uncached(theirs, words, prompt[i], n, memory[i], hidden, 9)
        assert found.tokens[i].tolist() == want + [V] * (max(lengths) - n)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lengths", [(4, 4), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("options", SWITCHES, ids=lambda o: "-".join(map(str, o.values())))
def test_encoder_with_a_causal_mask_is_token_for_token_torch(options, lengths):
    theirs, ours, words = made("Encoder", activation=torch.tanh, **options)
    prompt = prompts(lengths)
    found = ours.generate(
        prompt, embed=words.embed, logits=words.head, max_new_tokens=9, lengths=torch.tensor(lengths)
    )
    for i, n in enumerate(lengths):
        assert found.tokens[i, : n + 9].tolist() == uncached(theirs, words, prompt[i], n, None, None, 9)


@pytest.mark.parametrize("eos", [3, [3, 7, 11], {3, 7, 11}, torch.tensor([3, 7, 11])], ids=str)
def test_end_of_sequence(eos):
    theirs, ours, words = made("Decoder", batch_first=True)
    prompt, memory = prompts((2, 1, 3, 2, 2, 1)), torch.randn(6, S, E)
    lengths = torch.tensor([2, 1, 3, 2, 2, 1])
    found = ours.generate(
        prompt,
        memory,
        embed=words.embed,
        logits=words.head,
        max_new_tokens=40,
        lengths=lengths,
        eos=eos,
        pad=-1,
    )
    assert found.tokens.shape[1] == found.lengths.max()
    ends = [eos] if isinstance(eos, int) else [int(each) for each in eos]
    for i, row in enumerate(found.tokens.tolist()):
        want = uncached(theirs, words, prompt[i], int(lengths[i]), memory[i], None, 40, ends)
        assert found.lengths[i] == len(want)
        assert row == want + [-1] * (len(row) - len(want))
    assert len({int(n) for n in found.lengths}) > 1, "the case should end at different lengths"


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence(batch_first):
    theirs, ours, words = made("Decoder", batch_first=batch_first)
    prompt, memory = torch.randint(V, (3,)), torch.randn(S, E)
    options = {"embed": words.embed, "logits": words.head, "max_new_tokens": 5}
    found = ours.generate(prompt, memory, memory_key_padding_mask=PADDING[1], **options)
    assert found.tokens.tolist() == uncached(theirs, words, prompt, 3, memory, PADDING[1:2], 5)
    assert found.lengths.shape == () and int(found.lengths) == 8
    assert torch.equal(ours.generate(prompt, memory, **{**options, "max_new_tokens": 0}).tokens, prompt)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("parts", [(7,), (1,) * 7, (3, 1, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@torch.no_grad()
def test_steps_are_the_rows_of_a_whole_pass(kind, batch_first, padded, parts):
    theirs, ours, _ = made(kind, torch.float64, batch_first=batch_first)
    x = arranged(torch.randn(3, 7, E, dtype=torch.float64), ours)
    memory = [arranged(torch.randn(3, S, E, dtype=torch.float64), ours)] if kind == "Decoder" else []
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    if padded:
        hidden[1, :4], hidden[2, 5:] = True, True  # left and right
    mask = torch.ones(7, 7).triu(1).bool()
    word = "src" if kind == "Encoder" else "tgt"
    with (
        torch.enable_grad()
    ):  # torch's native path gives NaN to a query that sees nothing, and to all behind it
        want = theirs(x, *memory, mask, **{f"{word}_key_padding_mask": hidden}).detach()
    cache, found, at = KVCache(), [], 0
    dim = 1 if batch_first else 0
    for n in parts:
        padding = hidden[:, at : at + n]
        more = {f"{word}_key_padding_mask": padding} if padding.any() or at % 2 else {}
        found.append(ours.step(x.narrow(dim, at, n), *memory, cache, **more))
        at += n
        assert cache.length == at
    got = torch.cat(found, dim=dim)
    keep = arranged(~hidden[..., None], ours).expand_as(got)
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-10, atol=1e-10)
    assert cache.lengths.tolist() == (~hidden).sum(1).tolist()


@torch.no_grad()
def test_each_position_is_computed_once_and_the_memory_too():
    _, ours, words = made("Decoder", layers=3, batch_first=True)
    calls = []
    for layer in ours.layers:
        memory_pair = layer.multihead_attn.memory_pair
        layer.multihead_attn.memory_pair = lambda m, f=memory_pair: calls.append(1) or f(m)
    with _backend.watch() as seen:
        ours.generate(
            prompts((3, 2)), torch.randn(2, S, E), embed=words.embed, logits=words.head, max_new_tokens=5
        )
    assert len(calls) == 3
    queries = [call.tensors[0].shape[2] for call, _ in seen if call.op == "attention"]
    assert queries == [n for n in (3, 1, 1, 1, 1) for _ in range(2 * 3)]


def small(**options):
    _, ours, _ = made("Encoder", batch_first=True)
    return ours, KVCache(**options)


def test_storage_doubles():
    stack, cache = small()
    capacities = []
    for _ in range(100):
        stack.step(torch.randn(2, 1, E), cache)
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [16, 32, 64, 128]
    assert cache.nbytes == 2 * 2 * 2 * 128 * E * 4  # layers, keys and values, batch
    stack, cache = small(max_length=40)
    stack.step(torch.randn(2, 33, E), cache)
    stack.step(torch.randn(2, 1, E), cache)
    assert cache.capacity == 40
    stack, cache = small(capacity=50)
    stack.step(torch.randn(2, 50, E), cache)
    assert cache.capacity == 50


def test_overflow_changes_nothing():
    stack, cache = small(max_length=5)
    x = torch.randn(2, 8, E)
    stack.step(x[:, :4], cache)
    with pytest.raises(RuntimeError, match=r"2 more positions behind the 4 held exceed max_length = 5"):
        stack.step(x[:, 4:6], cache)
    assert cache.length == 4
    want = small()[0]
    want.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack.step(x[:, 4:5], cache), want.step(x[:, :5], KVCache())[:, 4:])


def test_truncate_select_and_clear():
    stack, cache = small()
    x = torch.randn(3, 6, E)
    hidden = torch.zeros(3, 4, dtype=torch.bool)
    hidden[0, 0] = True
    stack.step(x[:, :4], cache, src_key_padding_mask=hidden)
    stack.step(torch.randn(3, 2, E), cache)  # a draft
    cache.truncate(4)
    order = torch.tensor([2, 0, 0, 1])
    cache.select(order)
    assert (cache.batch, cache.length) == (4, 4)
    got = stack.step(x[order, 4:], cache)
    fresh = KVCache()
    stack.step(x[order, :4], fresh, src_key_padding_mask=hidden[order])
    torch.testing.assert_close(got, stack.step(x[order, 4:], fresh))
    cache.clear()
    assert (cache.length, cache.batch, cache.lengths, cache.nbytes) == (0, None, None, 0)
    assert stack.step(x[:1], cache).shape == (1, 6, E)


def test_selected_memory():
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory, order = torch.randn(3, 4, E), torch.randn(3, S, E), torch.tensor([1, 1, 0])
    cache, fresh = KVCache(), KVCache()
    ours.step(x[:, :2], memory, cache, memory_key_padding_mask=PADDING)
    cache.select(order)
    ours.step(x[order, :2], memory[order], fresh, memory_key_padding_mask=PADDING[order])
    got, want = ours.step(x[order, 2:], None, cache), ours.step(x[order, 2:], None, fresh)
    torch.testing.assert_close(got, want)


def test_a_copy_goes_on_by_itself():
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory, cache = torch.randn(2, 4, E), torch.randn(2, S, E), KVCache()
    ours.step(x[:, :2], memory, cache)
    other = copy.deepcopy(cache)
    want = ours.step(x[:, 2:], memory, cache)
    assert (other.length, other.owner, other.memory) == (2, ours, memory)
    torch.testing.assert_close(ours.step(x[:, 2:], memory, other), want)
    with_stack, its_cache = copy.deepcopy((ours, cache))
    its_cache.truncate(2)
    torch.testing.assert_close(with_stack.step(x[:, 2:], None, its_cache), want)


def test_a_shallow_copy_has_storage_of_its_own():
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory, cache = torch.randn(2, 4, E), torch.randn(2, S, E), KVCache(capacity=8)
    ours.step(x[:, :2], memory, cache)
    one, other = copy.copy(cache), copy.copy(cache)
    ours.step(x[:, 2:3], None, one)
    ours.step(x[:, :1], None, other)
    want = ours.step(x, memory, KVCache())[:, 3:]
    torch.testing.assert_close(ours.step(x[:, 3:], None, one), want, rtol=1e-4, atol=1e-5)


def test_a_saved_cache_leaves_its_stack_behind():
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory, cache = torch.randn(2, 4, E), torch.randn(2, S, E), KVCache()
    ours.step(x[:, :2], memory, cache)
    saved = pickle.dumps(cache)
    assert b"TransformerDecoder" not in saved and cache.owner is ours
    loaded = pickle.loads(saved)
    want = ours.step(x[:, 2:], None, cache)
    torch.testing.assert_close(ours.step(x[:, 2:], None, loaded), want)
    assert loaded.owner is ours


def test_a_stack_that_changes_between_steps():
    stack, cache = small()
    x = torch.randn(2, 3, E)
    stack.step(x[:, :1], cache)
    stack.layers[1].train()
    with pytest.raises(RuntimeError, match="training mode"):
        stack.step(x[:, 1:], cache)
    stack.eval()
    last = stack.layers.pop(1)
    with pytest.raises(ValueError, match="holds what 2 layers made and the stack has 1"):
        stack.step(x[:, 1:], cache)
    stack.layers.append(last)
    stack.double()
    for count in (1, 2):  # in one call and by parts
        with pytest.raises(RuntimeError, match=r"it holds torch\.float32, and .* torch\.float64"):
            stack.step(x[:, 1 : 1 + count].double(), cache)
    stack.float()
    assert cache.length == 1
    want = stack.step(x, KVCache())[:, 1:]
    torch.testing.assert_close(stack.step(x[:, 1:], cache), want, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_changes_behind_a_memory():
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory, cache = torch.randn(2, 1, E), torch.randn(2, S, E), KVCache()
    ours.step(x, memory, cache)
    cache.truncate(0)
    del ours.layers[0]
    with pytest.raises(ValueError, match="clear the cache"):
        ours.step(x, None, cache)


def test_a_cache_of_wide_numbers_goes_on_under_autocast():
    stack, cache = small()
    x = torch.randn(2, 3, E)
    stack.step(x[:, :1], cache)
    with torch.autocast("cpu", torch.bfloat16):
        found = stack.step(x[:, 1:], cache)
    torch.testing.assert_close(found, stack.step(x, KVCache())[:, 1:], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e300, torch.inf])
def test_a_temperature_of_any_size(temperature):
    scores = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]] * 50)
    found = set(choose_token(scores, temperature).tolist())
    assert found == {1} if temperature < 1 else found == {0, 1, 3}


class Half(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2", "dropout3"])
def test_what_stands_in_place_of_a_dropout_runs(name):
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory = torch.randn(2, 4, E), torch.randn(2, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    for replaced in (nn.Identity(), Half()):
        setattr(ours.layers[1], name, replaced)
        torch.testing.assert_close(ours.step(x, memory, KVCache()), ours(x, memory, mask))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_within_a_step_leaves_the_cache_as_it_was(failing):
    stack, cache = small()
    x = torch.randn(2, 5, E)
    norm = stack.layers[failing].norm2
    norm.forward = None
    with pytest.raises(TypeError):
        stack.step(torch.randn(3, 2, E), cache)
    del norm.forward
    assert cache.length == 0
    first = stack.step(x[:, :3], cache)
    norm.forward = None
    with pytest.raises(TypeError):
        stack.step(x[:, 3:], cache)
    del norm.forward
    assert cache.length == 3
    torch.testing.assert_close(
        torch.cat((first, stack.step(x[:, 3:], cache)), dim=1), stack.step(x, KVCache()), rtol=1e-4, atol=1e-5
    )


def test_a_first_call_that_fails_may_be_made_again_with_another_memory():
    _, ours, _ = made("Decoder", batch_first=True)
    x, memory, cache = torch.randn(2, 3, E), torch.randn(2, S, E), KVCache()
    ours.layers[1].norm3.forward = None
    with pytest.raises(TypeError):
        ours.step(x, torch.randn(2, S + 1, E), cache)
    del ours.layers[1].norm3.forward
    torch.testing.assert_close(ours.step(x, memory, cache), ours.step(x, memory, KVCache()))


class OwnBlock(seqkern.nn.TransformerEncoderLayer):
    def _sa_block(self, x, *args, **kwargs):
        return 2 * super()._sa_block(x, *args, **kwargs)


def own_block():
    return seqkern.nn.TransformerEncoder(OwnBlock(E, H, FF, batch_first=True), 1).eval()


class OwnStack(seqkern.nn.TransformerEncoder):
    def forward(self, src, *args, **kwargs):
        return 2 * super().forward(src, *args, **kwargs)


def own_stack():
    return OwnStack(seqkern.nn.TransformerEncoderLayer(E, H, FF, batch_first=True), 1).eval()


def part_in_training(name):
    stack, _ = small()
    stack.layers[0].get_submodule(name).train()
    return stack


def emptied():
    _, ours, _ = made("Decoder", batch_first=True)
    cache = KVCache()
    ours.step(torch.zeros(2, 1, E), torch.zeros(2, S, E), cache)
    cache.truncate(0)
    return ours, cache


def torchs():
    return seqkern.nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF, batch_first=True), 1).eval()


def used():
    stack, cache = small()
    stack.step(torch.zeros(2, 3, E), cache)
    return stack, cache


def decoder_step(memory, x=None, cache=None, **options):
    x = torch.zeros(2, 1, E) if x is None else x
    return made("Decoder", batch_first=True)[1].step(x, memory, cache or KVCache(), **options)


def other_memory():
    _, ours, _ = made("Decoder", batch_first=True)
    cache = KVCache()
    ours.step(torch.zeros(2, 1, E), torch.zeros(2, S, E), cache)
    ours.step(torch.zeros(2, 1, E), torch.ones(2, S, E), cache)


BAD_STEPS = {
    "training": (
        RuntimeError,
        r"\.eval\(\)",
        lambda: small()[0].train().step(torch.zeros(2, 1, E), KVCache()),
    ),
    "torch's layer": (TypeError, "accelerate", lambda: torchs().step(torch.zeros(2, 1, E), KVCache())),
    "own block": (TypeError, "its own _sa_block", lambda: own_block().step(torch.zeros(2, 1, E), KVCache())),
    "own stack": (TypeError, "its own forward", lambda: own_stack().step(torch.zeros(2, 1, E), KVCache())),
    "dropout in training": (
        RuntimeError,
        r"\.eval\(\)",
        lambda: part_in_training("dropout1").step(torch.zeros(2, 1, E), KVCache()),
    ),
    "attention in training": (
        RuntimeError,
        r"\.eval\(\)",
        lambda: part_in_training("self_attn").step(torch.zeros(2, 1, E), KVCache()),
    ),
    "batch of the memory": (
        ValueError,
        "batch 3.*cache's 2",
        lambda: (lambda s, c: s.step(torch.zeros(3, 1, E), None, c))(*emptied()),
    ),
    "length of parts": (TypeError, "max_length is 1.5", lambda: KVCache(1.5)),  # type: ignore[arg-type]
    "rank": (ValueError, "3-D, or 2-D", lambda: small()[0].step(torch.zeros(E), KVCache())),
    "features": (ValueError, "features", lambda: small()[0].step(torch.zeros(2, 1, E + 1), KVCache())),
    "batch": (ValueError, "batch 3", lambda: (lambda s, c: s.step(torch.zeros(3, 1, E), c))(*used())),
    "another stack": (ValueError, "another stack", lambda: small()[0].step(torch.zeros(2, 1, E), used()[1])),
    "padding": (
        ValueError,
        r"expected torch.bool \[2, 1\]",
        lambda: small()[0].step(torch.zeros(2, 1, E), KVCache(), src_key_padding_mask=torch.zeros(2, 1)),
    ),
    "no memory": (ValueError, "memory is None", lambda: decoder_step(None)),
    "memory of another batch": (ValueError, "rank and batch", lambda: decoder_step(torch.zeros(3, S, E))),
    "memory of other features": (
        ValueError,
        "memory has",
        lambda: decoder_step(torch.zeros(2, S, E + 1)),
    ),
    "memory padding": (
        ValueError,
        "memory_key_padding_mask",
        lambda: decoder_step(torch.zeros(2, S, E), memory_key_padding_mask=torch.zeros(2, S + 1)),
    ),
    "other memory": (ValueError, "another memory", other_memory),
    "negative length": (ValueError, "max_length is -1", lambda: KVCache(-1)),
    "capacity": (ValueError, "at most max_length", lambda: KVCache(3, capacity=4)),
    "truncate": (ValueError, "between 0 and the 3 held", lambda: used()[1].truncate(4)),
    "select": (ValueError, "torch.int64", lambda: used()[1].select(torch.zeros(2))),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps(name):
    kind, message, call = BAD_STEPS[name]
    with pytest.raises(kind, match=message):
        call()


BAD_OPTIONS = {
    "max_new_tokens": {"max_new_tokens": -1},
    "temperature": {"temperature": -1.0},
    "top_k and top_p need a temperature": {"top_k": 3},
    "top_k is 0": {"temperature": 1.0, "top_k": 0},
    "top_p is 1.5": {"temperature": 1.0, "top_p": 1.5},
    "lengths": {"lengths": torch.tensor([1, 9])},
    r"expected torch.int64 \[2\]": {"lengths": torch.tensor([1])},
    "prompt is torch.float32": {"prompt": torch.zeros(2, 3)},
    r"prompt is torch.int64 \[2, 0\]": {"prompt": torch.zeros(2, 0, dtype=torch.int64)},
    "embed gave": {"embed": lambda tokens, positions: torch.zeros(3, 2, E)},
    "logits gave": {"logits": lambda x: x[0]},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options(message):
    _, ours, words = made("Encoder", batch_first=True)
    options = {"prompt": prompts((3, 3)), "embed": words.embed, "logits": words.head, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        ours.generate(**{**options, **BAD_OPTIONS[message]})
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        ours.train().generate(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", [[1, 2, 3]]),
        ("lengths", [3, 3]),
        ("max_new_tokens", 2.0),
        ("pad", 1.5),
        ("temperature", None),
        ("top_k", 1.5),
        ("top_p", "most"),
        ("eos", 1.5),
    ],
)
def test_options_of_another_type(name, value):
    _, ours, words = made("Encoder", batch_first=True)
    options = {"prompt": prompts((3, 3)), "embed": words.embed, "logits": words.head, "max_new_tokens": 2}
    with pytest.raises(TypeError, match=f"generate: {name} is"):
        ours.generate(**{**options, name: value})


def shares_of(scores, count=4000, **options):
    generator = torch.Generator().manual_seed(2)
    drawn = choose_token(scores.expand(count, -1), generator=generator, **options)
    return torch.bincount(drawn, minlength=scores.shape[-1]) / count


def test_choice_of_a_token():
    shares = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    scores = shares.log()[None]
    assert choose_token(scores).tolist() == [1]

    def near(got, want):
        torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=0, atol=0.03)

    near(shares_of(scores, temperature=1.0), shares.tolist())
    squared = shares.square() / shares.square().sum()
    near(shares_of(scores, temperature=0.5), squared.tolist())
    near(shares_of(scores, temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0])
    near(shares_of(scores, temperature=1.0, top_k=99), shares.tolist())
    near(shares_of(scores, temperature=1.0, top_p=0.6), [0, 4 / 7, 0, 3 / 7, 0])
    near(shares_of(scores, temperature=1.0, top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85])
    near(shares_of(scores, temperature=1.0, top_p=0.01), [0, 1, 0, 0, 0])
    near(shares_of(scores, temperature=1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0])
    assert choose_token(torch.tensor([[1.0, 3.0, 2.0]]), temperature=1e-45).tolist() == [1]


def test_draws_are_reproducible():
    _, ours, words = made("Decoder", batch_first=True)
    options = {
        "embed": words.embed,
        "logits": words.head,
        "max_new_tokens": 12,
        "temperature": 2.0,
        "top_k": 9,
    }
    prompt, memory = prompts((2, 2)), torch.randn(2, S, E)

    def run(seed):
        return ours.generate(prompt, memory, generator=torch.Generator().manual_seed(seed), **options).tokens

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_no_gradient_is_kept():
    stack, cache = small()
    assert not stack.step(torch.randn(2, 3, E, requires_grad=True), cache).requires_grad
