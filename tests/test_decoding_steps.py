"""Steps on a KVCache: the rows of a whole pass, whatever the parts; what they refuse."""

import pytest
import torch
from torch import nn

import seqkern
from seqkern.nn import KVCache, _step
from seqkern.ops import _backend
from seqkern.testing_decoding import FF, E, H, S, arranged, made, prompts, small

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"
)


@pytest.mark.usefixtures("as_it_is_or_cpu")
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
@pytest.mark.built
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_generate_looks_at_each_layer_once(kind, monkeypatch):
    """For the steps of one position: the prompt's own are several, unless it is one token."""
    _, ours, words = made(kind, layers=3, batch_first=True)
    looked_at = []
    prepared = _step.prepared
    monkeypatch.setattr(
        _step, "prepared", lambda layer, *rest: looked_at.append(layer) or prepared(layer, *rest)
    )
    memory = [torch.randn(2, S, E)] if kind == "Decoder" else []
    for prompt in (prompts((3, 2)), prompts((1, 1))):
        looked_at.clear()
        ours.generate(prompt, *memory, embed=words.embed, logits=words.head, max_new_tokens=5)
        assert looked_at == list(ours.layers)
    # a stack that somebody listens to goes by its parts, in each step anew
    heard = []
    ours.layers[1].linear1.register_forward_hook(lambda *_: heard.append(1))
    ours.generate(prompts((1, 1)), *memory, embed=words.embed, logits=words.head, max_new_tokens=5)
    assert len(heard) == 5


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


def test_no_gradient_is_kept():
    stack, cache = small()
    assert not stack.step(torch.randn(2, 3, E, requires_grad=True), cache).requires_grad
