"""attn_implementation="seqkern" in Hugging Face transformers: the logits and gradients of its eager attention."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern.ops import _backend
from seqkern.testing import relative_rms

transformers = pytest.importorskip("transformers")


from seqkern.integrations import _transformers_masks as door_masks  # noqa: E402
from seqkern.integrations import transformers as door  # noqa: E402
from seqkern.integrations._transformers_masks import make_mask  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("transformers_registered"),
]

VOCABULARY, LENGTH = 50, 9
NO_END = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, **NO_END, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 4, "head_dim": 8}
IMAGES = {k: SIZES[k] for k in list(SIZES)[:4]} | {"image_size": 16, "patch_size": 4}
TWO_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    **NO_END,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """A model's class, its configuration, and what of it is tested."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "ids"
    generates: bool = True


FAMILIES = {
    "bert": Family("BertForMaskedLM", "BertConfig", SIZES, generates=False),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SIZES, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
        generates=False,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, **NO_END},
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**GROUPED, **WINDOW}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, **WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    ),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, **WINDOW}),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, **WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**GROUPED, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "sliding_window": 4}),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "attention_chunk_size": 4,
            "num_local_experts": 1,
            "intermediate_size_mlp": 32,
        },
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            **NO_END,
            "decoder_start_token_id": 0,
        },
        inputs="pairs",
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {**TWO_STACKS, "max_position_embeddings": 40, "forced_eos_token_id": None},
        inputs="pairs",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **TWO_STACKS,
            "eos_token_id": 2,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 30,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        inputs="sound",
    ),
    "vit": Family("ViTModel", "ViTConfig", IMAGES, inputs="images", generates=False),
    "clip": Family("CLIPVisionModel", "CLIPVisionConfig", IMAGES, inputs="images", generates=False),
}
DECODERS = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss", "llama4")


def pair(family: Family, **options):
    """The same random model twice, with the eager attention and with ours."""
    config = getattr(transformers, family.config)(**{**family.options, **options})
    cls = getattr(transformers, family.model)
    eager, ours = (
        cls._from_config(copy.deepcopy(config), attn_implementation=name).eval()
        for name in ("eager", "seqkern")
    )
    for p in eager.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def inputs_of(family: Family) -> dict[str, Tensor]:
    if family.inputs == "images":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if family.inputs == "sound":
        return {"input_features": torch.randn(2, 8, 20)}
    return {"input_ids": ids(2, LENGTH)}


def left_padded() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def padded(family: Family, how: str) -> dict[str, Tensor]:
    return {"attention_mask": left_padded()} if how == "padded" else {}


def result(model, **inputs) -> Tensor:
    found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def assert_same(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    assert relative_rms(got, want) < bound


CASES = [
    pytest.param(name, how, id=f"{name}-{how}")
    for name, family in FAMILIES.items()
    for how in ("plain", "padded")
    if how == "plain" or family.inputs in ("ids", "pairs")
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_logits_and_gradients(name, how):
    family = FAMILIES[name]
    eager, ours = pair(family)
    inputs = inputs_of(family) | padded(family, how)
    if family.inputs in ("pairs", "sound"):
        inputs["decoder_input_ids"] = ids(2, 5)
    with _backend.watch() as seen:
        got = result(ours, **inputs)
    want = result(eager, **inputs)
    assert {call.op for call, _ in seen} == {"attention"}
    if how == "padded" and family.inputs == "ids":  # what stands at padding is nobody's
        got, want = (x[left_padded().bool()] for x in (got, want))
    assert_same(got, want)
    weight = torch.randn_like(want)
    gradients = [
        torch.autograd.grad(
            (x * weight).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        for x, model in ((got, ours), (want, eager))
    ]
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    flat = [torch.cat([g.flatten() for g in found if g is not None]) for found in gradients]
    assert_same(*flat, 1e-4)  # T5 multiplies by no 1 / sqrt(D)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("how", ["plain", "padded"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_generates_the_same_tokens(name, how, cache):
    family = FAMILIES[name]
    if family.inputs == "sound" and (how == "padded" or cache == "static"):
        pytest.skip("Whisper has no padding of its input, and a generate of its own")
    inputs = inputs_of(family) | padded(family, how)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    got, want = (model.generate(**inputs, **options) for model in reversed(pair(family)))
    assert torch.equal(got, want)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("how", ["plain", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_pieces_then_steps(name, how, static):
    """Several queries on a cache that holds keys: causal from the last key, not from the first."""
    family, length = FAMILIES[name], 19
    tokens, mask = ids(2, length), torch.ones(2, length, dtype=torch.long)
    if how == "padded":
        mask[0, :3] = 0
    found = []
    for model in pair(family):
        cache = (
            transformers.StaticCache(config=model.config, max_cache_len=24)
            if static
            else transformers.DynamicCache(config=model.config)
        )
        parts = []
        for start, end in ((0, 7), (7, 8), (8, 13), (13, length)):
            more = {"attention_mask": mask[:, :end]} if how == "padded" else {}
            parts.append(model(tokens[:, start:end], past_key_values=cache, **more).logits)
        found.append(torch.cat(parts, 1)[mask.bool()])
    assert_same(found[1], found[0])


# Whose modules say of themselves other than what their masks say: causal, or not.
BELIED = {
    "nllb_moe": Family(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {**TWO_STACKS, "num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0},
        inputs="pairs",
    ),
    "pegasus_x": Family("PegasusXForConditionalGeneration", "PegasusXConfig", TWO_STACKS, inputs="pairs"),
    "bigbird_pegasus": Family(  # its encoder's attention is its own
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        {**TWO_STACKS, "attention_type": "original_full"},
        inputs="pairs",
    ),
    "deepseek_v4": Family(  # extends its masks
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {
            **{name: SIZES[name] for name in ("num_hidden_layers", "num_attention_heads", "vocab_size")},
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "q_lora_rank": 24,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_topk": 4,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4},
            "hc_mult": 2,
        },
    ),
    "gemma": Family(
        "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8, "use_bidirectional_attention": True}
    ),
    "splinter": Family("SplinterModel", "SplinterConfig", SIZES),
    "align": Family("AlignTextModel", "AlignTextConfig", {**SIZES, "pad_token_id": 0}),
    "clap": Family("ClapTextModel", "ClapTextConfig", {**SIZES, "pad_token_id": 0}),
}


@pytest.mark.parametrize("how", ["plain", "all seen", "padded"])
@pytest.mark.parametrize("name", BELIED)
def test_what_a_module_says_of_itself_does_not_count(name, how):
    eager, ours = pair(BELIED[name])
    inputs = inputs_of(BELIED[name]) | padded(BELIED[name], how)
    keep = left_padded().bool() if how == "padded" else slice(None)
    if how == "all seen":
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
    if BELIED[name].inputs == "pairs":
        inputs["decoder_input_ids"], keep = ids(2, LENGTH), slice(None)
    assert_same(result(ours, **inputs)[keep], result(eager, **inputs)[keep])


# GPT-2 and OPT tell the attention nothing: their hooks collect what the layers return.
OPT = Family("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32})


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "gpt_oss", "gpt2", "opt"])
def test_weights(name):
    eager, ours = pair({**FAMILIES, "opt": OPT}[name])
    tokens = ids(2, LENGTH)
    want, got = (model(tokens, output_attentions=True).attentions for model in (eager, ours))
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


def test_packed_sequences_are_kept_apart():
    eager, ours = pair(FAMILIES["mistral"])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    tokens = ids(1, LENGTH)
    got, want = (result(m, input_ids=tokens, position_ids=places, use_cache=False) for m in (ours, eager))
    assert_same(got, want)


def test_masks_of_the_caller():
    eager, ours = pair(FAMILIES["llama"])
    seen = (torch.rand(2, 1, LENGTH, LENGTH) > 0.4) | torch.eye(LENGTH, dtype=torch.bool)
    tokens = ids(2, LENGTH)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    want = result(eager, input_ids=tokens, attention_mask=added)
    for mask in (added, seen):
        assert_same(result(ours, input_ids=tokens, attention_mask=mask), want)


@pytest.mark.parametrize("how", ["plain", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_decoder_that_is_told_not_to_be_causal(name, how):
    eager, ours = pair(FAMILIES[name], is_causal=False)
    inputs = {"input_ids": ids(2, LENGTH)} | padded(FAMILIES[name], how)
    keep = left_padded().bool() if how == "padded" else slice(None)
    assert_same(result(ours, **inputs)[keep], result(eager, **inputs)[keep])


@pytest.mark.parametrize("how", ["plain", "padded"])
def test_compiled_in_one_graph(how):
    eager, ours = pair(FAMILIES["mistral"])
    inputs = {"input_ids": ids(2, LENGTH), "use_cache": False} | padded(FAMILIES["mistral"], how)
    keep = left_padded().bool() if how == "padded" else slice(None)
    want = result(eager, **inputs)[keep]
    whole = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(result(whole, **inputs)[keep], want)
    for layer in ours.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert_same(result(ours, **inputs)[keep], want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    eager, ours = pair(FAMILIES["mistral"])
    ours.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    tokens = ids(2, LENGTH)
    labels = tokens.masked_fill(left_padded() == 0, -100)
    labels[0, :4] = -100  # the first token is predicted from padding
    for model in (eager.train(), ours):
        model(tokens, attention_mask=left_padded(), labels=labels).loss.backward()
    flat = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (ours, eager)]
    assert_same(*flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_eager(dtype):
    eager, ours = pair(FAMILIES["gemma2"])
    tokens = ids(2, LENGTH)
    want = result(eager.double(), input_ids=tokens)
    errors = [relative_rms(result(m.to(dtype), input_ids=tokens), want) for m in (ours, eager)]
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["Bloom", "Mpt", "BigBird"])
def test_models_with_attention_of_their_own_refuse(name):
    options = {"BigBird": {**SIZES, "attention_type": "original_full"}}.get(name, {"vocab_size": VOCABULARY})
    config = getattr(transformers, f"{name}Config")(**options, **({"n_layers": 1} if name == "Mpt" else {}))
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="seqkern")
    with pytest.raises(ValueError, match="computes its attention itself"):
        model(ids(1, LENGTH))


OWN = {  # parts of models, whose configurations AutoModel does not know
    "TrOCRForCausalLM": (
        "TrOCRConfig",
        {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32},
    ),
    "BlipTextModel": ("BlipTextConfig", {**SIZES, "encoder_hidden_size": 32}),
    "FlavaTextModel": ("FlavaTextConfig", SIZES),
    "GroupViTTextModel": ("GroupViTTextConfig", SIZES),
}


@pytest.mark.parametrize("name", OWN)
def test_parts_with_attention_of_their_own_refuse(name):
    config, options = OWN[name]
    config = getattr(transformers, config)(**{**options, "vocab_size": VOCABULARY, "pad_token_id": 0})
    model = getattr(transformers, name)._from_config(config, attn_implementation="seqkern")
    with pytest.raises(ValueError, match="computes its attention itself"):
        model(ids(1, LENGTH), attention_mask=torch.ones(1, LENGTH, dtype=torch.long))


def test_a_model_beside_one_of_its_own_is_served():
    """ESM's that folds names the same configuration, goes on from the results of the other, and is no reason."""
    from transformers.models.esm import modeling_esmfold

    door_masks._use_the_interface.cache_clear()
    assert not modeling_esmfold.EsmForProteinFolding._can_set_attn_implementation()
    eager, ours = pair(Family("EsmModel", "EsmConfig", {**SIZES, "pad_token_id": 1, "mask_token_id": 2}))
    inputs = inputs_of(BELIED["splinter"])
    assert_same(result(ours, **inputs), result(eager, **inputs))


def test_a_configuration_of_no_model_is_no_reason():
    transformers.BloomModel  # noqa: B018  # loads it
    config = transformers.PreTrainedConfig()
    assert make_mask(1, 3, 3, config=config) is not None


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_what_is_not_served_is_refused(name):
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"'{name}'.*eager"):
        door.attention(torch.nn.Identity(), q, q, q, None, **{name: torch.zeros(1)})


def test_explained():
    _, ours = pair(FAMILIES["llama"])
    with seqkern.backend("reference"):
        row, *others = seqkern.explain(ours, ids(2, LENGTH)).rows
    assert (row.kind, row.backend, row.calls) == ("attention", "reference", 2)
    assert all(
        each.kind == "torch.nn.Linear" and "not accelerated yet" in each.declined[0][1] for each in others
    )
