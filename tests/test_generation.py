"""generate: equal to torch's decoding that computes every position anew; the choice of a token."""

import itertools

import pytest
import torch

from seqkern.nn.generation import choose_token
from seqkern.testing_decoding import PADDING, E, S, V, arranged, made, prompts, uncached

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"
)
SWITCHES = [
    {"norm_first": norm_first, "batch_first": batch_first, "bias": norm_first != batch_first}
    for norm_first, batch_first in itertools.product((False, True), repeat=2)
]


@pytest.mark.usefixtures("as_it_is_or_cpu")
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


@pytest.mark.usefixtures("as_it_is_or_cpu")
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


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e300, torch.inf])
def test_a_temperature_of_any_size(temperature):
    scores = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]] * 50)
    found = set(choose_token(scores, temperature).tolist())
    assert found == {1} if temperature < 1 else found == {0, 1, 3}


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
