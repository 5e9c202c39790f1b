"""The masks that transformers' models are given, and what is read of a static cache."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from seqkern.integrations import transformers as door  # noqa: E402
from seqkern.integrations._transformers_masks import Band, SeenMask, band_of, make_mask  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("transformers_registered"),
]

FULL = masking_utils.bidirectional_mask_function
CAUSAL = masking_utils.causal_mask_function


@pytest.mark.parametrize(
    ("function", "band"),
    [
        (CAUSAL, Band(None, 0)),
        (FULL, Band()),
        (masking_utils.sliding_window_causal_mask_function(4), Band(3, 0)),
        (masking_utils.sliding_window_bidirectional_mask_function(4), Band(4, 4)),
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), None),
        (lambda b, h, q, k: k <= q, None),
        (masking_utils.or_masks(CAUSAL, FULL), None),
    ],
)
def test_bands_are_recognised(function, band):
    assert band_of(function, masking_utils) == band


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("function", [CAUSAL, FULL, masking_utils.sliding_window_causal_mask_function(4)])
@pytest.mark.parametrize(
    ("L", "S", "at", "first"),
    [
        (6, 6, 0, 0),
        (3, 9, 6, 0),
        (1, 9, 8, 0),
        (3, 12, 6, 0),
        (5, 12, 0, 0),
        (1, 12, 8, 0),
        (3, 6, 9, 6),
        (3, 6, 7, 4),
    ],
)
def test_masks_mean_what_transformers_says(L, S, at, first, function, padding):
    given = torch.rand(2, first + S) > 0.3 if padding else None
    what = {"q_offset": at, "kv_offset": first, "mask_function": function, "attention_mask": given}
    what["allow_is_bidirectional_skip"] = function is FULL
    want = masking_utils.eager_mask(2, L, S, dtype=torch.bfloat16, **what)
    got = make_mask(2, L, S, dtype=torch.bfloat16, **what)
    if want is None:
        assert got is None
        return
    assert torch.equal(got.shown().expand(2, 1, L, S), want == 0)
    plain = got + torch.zeros((), dtype=torch.bfloat16)
    assert plain.dtype is torch.bfloat16 and torch.equal(plain.expand(2, 1, L, S), want)


def test_a_band_is_eagers_mask_to_everybody_else():
    given = torch.tensor([[False, True, True], [True, True, True]])
    mask = make_mask(2, 3, 3, attention_mask=given)
    assert isinstance(mask, SeenMask) and mask.shape == (2, 1, 3, 3) and mask.dtype is torch.float32
    assert mask.written is None and "padded" in repr(mask)
    want = torch.ones(3, 3, dtype=torch.bool).tril() & given[:, None, None]
    least = torch.finfo(torch.float32).min
    assert torch.equal(copy.deepcopy(mask), torch.where(want, 0.0, least))
    mask[:, :, 2] = 0.0  # what is written into it stays
    want[:, :, 2] = True
    assert torch.equal(mask[..., :2], torch.where(want, 0.0, least)[..., :2])
    q = torch.randn(2, 1, 3, 4)
    got, _ = door.attention(torch.nn.Identity(), q, q, q, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q, want | ~want.any(-1, keepdim=True))
    torch.testing.assert_close(got.transpose(1, 2)[1], wanted[1])


class OwnAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.three = torch.nn.Linear(8, 24)

    def forward(self, x, mask):
        q, k, v = self.three(x).chunk(3, -1)
        return (q @ k.transpose(1, 2) + mask[:, 0]).softmax(-1) @ v


class OwnModel(transformers.PreTrainedModel):
    """Somebody's model that adds its mask to scores of its own."""

    config_class = type(
        "OwnConfig", (transformers.PreTrainedConfig,), {"model_type": "own", "num_hidden_layers": 1}
    )

    def __init__(self, config):
        super().__init__(config)
        self.attention = OwnAttention()
        self.post_init()

    def forward(self, inputs_embeds):
        mask = masking_utils.create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=None, past_key_values=None
        )
        return self.attention(inputs_embeds, mask)


@pytest.mark.parametrize("compiled", [False, True])
def test_code_of_somebodys_own_gets_the_mask_of_eager(compiled):
    eager, ours = (
        OwnModel._from_config(OwnModel.config_class(), attn_implementation=name)
        for name in ("eager", "seqkern")
    )
    ours.load_state_dict(eager.state_dict())
    x = torch.randn(2, 5, 8)
    run = torch.compile(ours, backend="eager") if compiled else ours
    torch.testing.assert_close(run(x), eager(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_static_cache_makes_no_more_graphs_than_with_torchs_attention():
    """One for the prompt and one for all tokens after it, whatever the number of keys."""
    from torch._dynamo.utils import counters

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    made, tokens = [], []
    for attention in ("sdpa", "seqkern"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        options = {"max_length": 12, "min_length": 12, "do_sample": False, "cache_implementation": "static"}
        ids = torch.ones(2, 4, dtype=torch.long)
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        made.append(counters["stats"]["unique_graphs"])
    assert made[1] <= made[0] and torch.equal(*tokens)


def test_a_static_cache_is_read_as_far_as_it_is_filled(monkeypatch):
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="seqkern").eval()
    read, attention = [], door.functional.attention

    def noting(query, key, *args, **options):
        read.append(key.shape[2])
        return attention(query, key, *args, **options)

    ids, padding = torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1], [1] * 4])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": padding}
    want = model.generate(ids, **options)
    monkeypatch.setattr(door.functional, "attention", noting)
    cache = transformers.StaticCache(config=config, max_cache_len=64)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    assert read == [4, 5, 6, 7]
