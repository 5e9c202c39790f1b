"""KVCache: room, bounds, order of sequences, copies."""

import copy
import pickle

import pytest
import torch

from seqkern.nn import KVCache
from seqkern.testing_decoding import PADDING, E, S, made, small

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"
)


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


def test_a_cache_of_wide_numbers_goes_on_under_autocast():
    stack, cache = small()
    x = torch.randn(2, 3, E)
    stack.step(x[:, :1], cache)
    with torch.autocast("cpu", torch.bfloat16):
        found = stack.step(x[:, 1:], cache)
    torch.testing.assert_close(found, stack.step(x, KVCache())[:, 1:], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("as_it_is_or_cpu")
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_what_inference_mode_filled_goes_on_outside_of_it(kind):
    _, ours, _ = made(kind, batch_first=True)
    x, memory = torch.randn(3, 40, E), [torch.randn(3, S, E)] if kind == "Decoder" else []
    hidden = torch.zeros(3, 2, dtype=torch.bool)
    hidden[0, 0] = True
    padding = {f"{'tgt' if memory else 'src'}_key_padding_mask": hidden}
    caches = KVCache(), KVCache()
    for mode, cache in zip((True, False), caches):
        with torch.inference_mode(mode):
            ours.step(x[:, :2], *memory, cache, **padding)
            cache.select(torch.tensor([2, 1, 0]))
    for at, n in ((2, 2), (4, 1), (5, 35)):  # the last of them grows
        got, want = (ours.step(x[:, at : at + n], *([None] if memory else []), cache) for cache in caches)
        assert torch.equal(got, want)


def test_a_length_of_another_library():
    stack, cache = small()
    stack.step(torch.randn(2, 3, E), cache)
    cache.truncate(torch.tensor(2))
    assert cache.length == 2


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "capacity is None", lambda cache: KVCache(5, capacity=None)),
        (TypeError, "length is 'a'", lambda cache: cache.truncate("a")),
        (TypeError, "sequences is a list", lambda cache: cache.select([0])),
        (IndexError, "holds 9, expected indices of the 2", lambda cache: cache.select(torch.tensor([0, 9]))),
        (IndexError, "holds -1, expected", lambda cache: cache.select(torch.tensor([0, -1]))),
    ],
)
def test_wrong_arguments(error, message, call):
    stack, cache = small()
    stack.step(torch.randn(2, 1, E), cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert (cache.length, cache.batch) == (1, 2)
