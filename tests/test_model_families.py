"""config.json files of each family as published, their totals, and what is refused by name.

Files restate what huggingface.co shows for the repository named beside each (2024 to 2026), with keys that change no shape left in
where they could be mistaken for ones that do.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardplan.costmodel.model import Model, layer_order, layer_parameters, parameter_counts
from shardplan.costmodel.model_config import load_model, model_digest, model_from_config
from shardplan.costmodel.model_families import FAMILIES, NOT_READ
from shardplan.hw_profiles.errors import InputError

Config = dict[str, object]


def dense(model_type: str, layers: int, hidden: int, ffn: int, heads: tuple[int, int], **more: object) -> Config:
    """Keys that most files have."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        **more,
    }


MISTRAL_7B = dense(
    "mistral", 32, 4096, 14336, (32, 8), architectures=["MistralForCausalLM"], hidden_act="silu", vocab_size=32000,
    max_position_embeddings=32768, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
)  # fmt: skip
QWEN2_5_7B = dense(
    "qwen2", 28, 3584, 18944, (28, 4), architectures=["Qwen2ForCausalLM"], max_position_embeddings=131072, max_window_layers=28,
    sliding_window=131072, use_mrope=False, use_sliding_window=False, tie_word_embeddings=False, vocab_size=152064,
)  # fmt: skip
QWEN3_8B = dense(
    "qwen3", 36, 4096, 12288, (32, 8), architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=128,
    max_position_embeddings=40960, max_window_layers=36, sliding_window=None, use_sliding_window=False,
    tie_word_embeddings=False, vocab_size=151936,
)  # fmt: skip
GEMMA_7B = dense(
    "gemma", 28, 3072, 24576, (16, 16), architectures=["GemmaForCausalLM"], attention_bias=False, head_dim=256,
    hidden_act="gelu", hidden_activation=None, max_position_embeddings=8192, vocab_size=256000,
)  # fmt: skip
GEMMA_2_9B = dense(
    "gemma2", 42, 3584, 14336, (16, 8), architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, head_dim=256, max_position_embeddings=8192, query_pre_attn_scalar=256, sliding_window=4096,
    vocab_size=256000,
)  # fmt: skip
GEMMA_3_27B: Config = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": dense(
        "gemma3_text", 62, 5376, 21504, (32, 16), head_dim=128, query_pre_attn_scalar=168, sliding_window=1024,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_hidden_layers": 27},
}  # fmt: skip
GPT_NEOX_20B: Config = {
    "architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0,
    "hidden_size": 6144, "intermediate_size": 24576, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
    "model_type": "gpt_neox", "num_attention_heads": 64, "num_hidden_layers": 44, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "vocab_size": 50432,
}  # fmt: skip
PHI_2 = dense(
    "phi", 32, 2560, 10240, (32, 32), architectures=["PhiForCausalLM"], attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.1,
    partial_rotary_factor=0.4, qk_layernorm=False, max_position_embeddings=2048, tie_word_embeddings=False, vocab_size=51200,
)  # fmt: skip
PHI_3_MINI = dense(
    "phi3", 32, 3072, 8192, (32, 32), architectures=["Phi3ForCausalLM"], attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0,
    max_position_embeddings=4096, sliding_window=2047, tie_word_embeddings=False, vocab_size=32064,
)  # fmt: skip
MIXTRAL_8X7B = dense(
    "mixtral", 32, 4096, 14336, (32, 8), architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2,
    max_position_embeddings=32768, sliding_window=None, router_aux_loss_coef=0.02, tie_word_embeddings=False, vocab_size=32000,
)  # fmt: skip
QWEN3_235B = dense(
    "qwen3_moe", 94, 4096, 12288, (64, 4), architectures=["Qwen3MoeForCausalLM"], attention_bias=False, decoder_sparse_step=1,
    head_dim=128, max_position_embeddings=40960, max_window_layers=94, mlp_only_layers=[], moe_intermediate_size=1536,
    norm_topk_prob=True, num_experts=128, num_experts_per_tok=8, sliding_window=None, use_sliding_window=False,
    tie_word_embeddings=False, vocab_size=151936,
)  # fmt: skip
QWEN1_5_MOE = dense(
    "qwen2_moe", 24, 2048, 5632, (16, 16), architectures=["Qwen2MoeForCausalLM"], decoder_sparse_step=1, num_experts=60,
    num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, max_position_embeddings=8192,
    max_window_layers=21, sliding_window=32768, use_sliding_window=False, tie_word_embeddings=False, vocab_size=151936,
)  # fmt: skip
GPT_OSS_20B = dense(
    "gpt_oss", 24, 2880, 2880, (64, 8), architectures=["GptOssForCausalLM"], attention_bias=True, head_dim=64,
    layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072, num_local_experts=32,
    num_experts_per_tok=4, experts_per_token=4, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False, vocab_size=201088,
    quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
)  # fmt: skip
DEEPSEEK_V2_LITE = dense(
    "deepseek_v2", 27, 2048, 10944, (16, 16), architectures=["DeepseekV2ForCausalLM"], first_k_dense_replace=1, kv_lora_rank=512,
    max_position_embeddings=163840, moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=64,
    n_shared_experts=2, num_experts_per_tok=6, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    topk_method="greedy", tie_word_embeddings=False, vocab_size=102400,
)  # fmt: skip
DEEPSEEK_V3 = dense(
    "deepseek_v3", 61, 7168, 18432, (128, 128), architectures=["DeepseekV3ForCausalLM"], ep_size=1, first_k_dense_replace=3,
    kv_lora_rank=512, max_position_embeddings=163840, moe_intermediate_size=2048, moe_layer_freq=1, n_group=8,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, num_nextn_predict_layers=1, q_lora_rank=1536,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc",
    tie_word_embeddings=False, vocab_size=129280,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)  # fmt: skip

PUBLISHED = {  # preset, file, parameters of the weight files on huggingface.co (safetensors metadata) or as noted
    "mistral-7b": (MISTRAL_7B, 7_241_732_096),
    "qwen2.5-7b": (QWEN2_5_7B, 7_615_616_512),
    "qwen3-8b": (QWEN3_8B, 8_190_735_360),
    "gemma-7b": (GEMMA_7B, 8_537_680_896),
    "gemma-2-9b": (GEMMA_2_9B, 9_241_705_984),
    "gpt-neox-20b": (GPT_NEOX_20B, 20_554_567_680),  # arXiv 2204.06745 Table 1
    "phi-2": (PHI_2, 2_779_683_840),
    "phi-3-mini": (PHI_3_MINI, 3_821_079_552),
    "mixtral-8x7b": (MIXTRAL_8X7B, 46_702_792_704),
    "qwen1.5-moe-a2.7b": (QWEN1_5_MOE, 14_315_784_192),
    "qwen3-235b-a22b": (QWEN3_235B, 235_093_634_560),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),  # arXiv 2508.10925 Table 1 prints 20.91 B
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
}


def read(config: Config) -> Model:
    return model_from_config(config, name="m")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_files_have_their_published_totals_and_equal_the_preset(preset: str) -> None:
    config, published = PUBLISHED[preset]
    model, known = read(config), load_model(preset)
    assert parameter_counts(model)["total"] == published
    assert replace(model, name=known.name, source=known.source) == known
    assert model_digest(model) == model_digest(known)


def test_deepseek_v3_main_model_modules_and_weight_files() -> None:
    """README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: the main model has 671 B, of which 36.7 B work on a token; the weight files'
    684,489,845,504 bf16 and fp8 values hold the module with embedding and head of its own, 11.5 B beside them."""
    counts = parameter_counts(read(DEEPSEEK_V3))
    main = parameter_counts(load_model("deepseek-v3"))
    tables = 2 * 129280 * 7168
    assert main["total"] == counts["total"] - counts["mtp"] == 671_026_419_200
    assert counts["total"] + tables == 684_489_845_504
    assert f"{(main['active'] - main['embedding']) / 1e9:.1f}" == "36.6"
    assert read({**DEEPSEEK_V3, "num_nextn_predict_layers": 0}).layers == load_model("deepseek-v3").layers


def test_deepseek_v3_layers_by_hand() -> None:
    """arXiv 2412.19437, section 4.2: 61 layers, the first three dense; 128 heads of 128 + 64; latents 1536 and 512."""
    model = read(DEEPSEEK_V3)
    (dense_kind, first), (sparse_kind, rest) = model.layers
    assert (first, rest, model.mtp_modules, model.layer_count) == (3, 58, 1, 61)
    h, heads = 7168, 128
    attention = 1536 * heads * 192 + 512 * heads * (128 + 128) + heads * 128 * h
    latent = h * (1536 + 512 + 64)
    assert layer_parameters(dense_kind) == {
        "attention": attention,
        "mlp": 3 * h * 18432,
        "router": 0,
        "norms": 2 * h + 1536 + 512,
        "latent": latent,
    }
    sparse = layer_parameters(sparse_kind)
    assert sparse["mlp"] == 256 * 3 * h * 2048
    assert sparse["router"] == 256 * h + 256
    assert sparse["shared_experts"] == 3 * h * 2048
    module, _ = model.runs[-1]
    assert layer_parameters(module) == {**sparse, "norms": sparse["norms"] + 3 * h, "mtp_projection": 2 * h * h}


def test_the_text_model_of_gemma_3_is_the_published_total_less_its_vision_tower() -> None:
    """google/gemma-3-27b-pt: 27,432,406,640 values. The SigLIP tower: patches of 14 x 14 x 3, 4096 positions, 27 layers of width 1152 with
    biases, a final norm; then a norm and a product to the stream."""
    model = read(GEMMA_3_27B)
    width, ffn = 1152, 4304
    layer = 4 * (width + 1) * width + 2 * width * ffn + width + ffn + 4 * width
    tower = (14 * 14 * 3 + 1) * width + 4096 * width + 27 * layer + 2 * width
    assert parameter_counts(model)["total"] == 27_432_406_640 - tower - (width * 5376 + width)
    assert model.source == "the text model of a gemma3, without what reads other inputs"
    assert (model.tied_embeddings, model.vocab) == (True, 262_208)  # of the class: the file omits both


def test_alternating_windows() -> None:
    windows = {name: [load_model(name).layers[i][0].window for i in layer_order(load_model(name))] for name in (
        "gemma-3-27b", "gemma-2-9b", "gpt-oss-120b", "mistral-7b", "qwen2.5-7b", "phi-4")}  # fmt: skip
    assert windows["gemma-3-27b"] == ([1024] * 5 + [0]) * 10 + [1024] * 2
    assert windows["gemma-2-9b"] == [4096, 0] * 21
    assert windows["gpt-oss-120b"] == [128, 0] * 18
    assert set(windows["mistral-7b"]) == {4096}
    assert set(windows["qwen2.5-7b"]) == set(windows["phi-4"]) == {0}
    late = read({**QWEN2_5_7B, "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 20})
    assert [late.layers[i][0].window for i in layer_order(late)] == [0] * 20 + [1024] * 8


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("gpt-oss-20b", "3.61"),  # arXiv 2508.10925 Table 1, without the embedding
        ("gpt-oss-120b", "5.13"),
    ],
)
def test_active_parameters_without_the_embedding(preset: str, billions: str) -> None:
    counts = parameter_counts(load_model(preset))
    assert f"{(counts['active'] - counts['embedding']) / 1e9:.2f}" == billions


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("mixtral-8x22b", "39"),  # mistral.ai/news/mixtral-8x22b
        ("qwen3-235b-a22b", "22"),  # arXiv 2505.09388 Table 2
        ("qwen2-57b-a14b", "14"),  # arXiv 2407.10671 Table 1
        ("deepseek-v2", "21"),  # arXiv 2405.04434
    ],
)
def test_active_parameters_as_the_papers_round_them(preset: str, billions: str) -> None:
    assert f"{parameter_counts(load_model(preset))['active'] / 1e9:.0f}" == billions


def test_a_text_model_may_tell_its_type_and_tying_in_either_place() -> None:
    inner = {key: value for key, value in MISTRAL_7B.items() if key not in ("model_type", "architectures")}
    nested = {"model_type": "mistral3", "text_config": inner, "vision_config": {"model_type": "pixtral"}}
    assert read(nested).layers == read(MISTRAL_7B).layers
    with pytest.raises(InputError, match="tie_word_embeddings=true contradicts false in text_config"):
        read({**nested, "tie_word_embeddings": True})


@pytest.mark.parametrize("model_type", NOT_READ)
def test_known_schemas_that_are_refused_say_why(model_type: str) -> None:
    with pytest.raises(InputError) as error:
        read({"model_type": model_type})
    assert f'model_type="{model_type}" cannot be read: {NOT_READ[model_type]}' in str(error.value)
    assert "model types that can be read: llama, gpt2" in error.value.remedy
    assert not set(NOT_READ) & set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, ["mllama_text_model", "cannot be read"]),
        ({**MISTRAL_7B, "layer_types": ["sliding_attention"] * 32}, ["layer_types", "is not modelled for mistral", "leave it out"]),
        ({**QWEN3_8B, "layer_types": ["linear_attention"] * 36}, ["layer_types", "linear_attention", "full_attention or"]),
        ({**GPT_OSS_20B, "layer_types": ["full_attention"]}, ["layer_types", "lists 1 layers", "list 24, or leave it out"]),
        ({**GPT_OSS_20B, "sliding_window": None}, ["sliding_window=null", "layer_types lists sliding_attention"]),
        ({**QWEN3_235B, "mlp_only_layers": ["first"]}, ["mlp_only_layers", "is not a list of layers"]),
        ({**QWEN3_235B, "num_experts_per_tok": 129}, ["num_experts_per_tok=129 is more than num_experts=128"]),
        ({**DEEPSEEK_V3, "moe_layer_freq": 2}, ["moe_layer_freq=2 is not modelled for deepseek_v3", "leave it out, or write 1"]),
        ({**DEEPSEEK_V3, "num_key_value_heads": 64}, ["num_key_value_heads=64", "latent attention makes keys for every head"]),
        ({**DEEPSEEK_V3, "qk_rope_head_dim": 63}, ["qk_rope_head_dim=63", "odd"]),
        ({**GEMMA_7B, "use_bidirectional_attention": True}, ["use_bidirectional_attention=true is not modelled for gemma"]),
        ({**GPT_NEOX_20B, "num_attention_heads": 60}, ["num_attention_heads=60 does not divide hidden_size=6144"]),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_refused_by_field_value_and_remedy(config: Config, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        read(config)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert error.value.remedy


def test_the_documentation_s_example_of_a_family_reads_a_published_file(root: Path) -> None:
    """huggingface.co/ibm-granite/granite-3.0-8b-base: 8.17 B."""
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(example, found)
    config = dense(
        "granite", 40, 4096, 12800, (32, 8), vocab_size=49155, max_position_embeddings=4096, tie_word_embeddings=True
    )
    model = model_from_config(config, name="granite", families={**FAMILIES, "granite": found["GRANITE"]})
    assert f"{parameter_counts(model)['total'] / 1e9:.2f}" == "8.17"


def test_the_documentation_names_every_family(root: Path) -> None:
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in FAMILIES)
