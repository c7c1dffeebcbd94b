"""config.json files of further families as published: OLMo 2, Command R, GLM-4.5, OPT, Falcon."""

from __future__ import annotations

import pytest

from shardplan.costmodel.model import Model, layer_parameters, parameter_counts
from shardplan.costmodel.model_config import load_model, model_from_config
from shardplan.costmodel.model_document import model_document, model_from_document
from shardplan.hw_profiles.errors import InputError

Config = dict[str, object]


def read(config: Config) -> Model:
    return model_from_config(config, name="m")


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


FALCON_7B: Config = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544, "multi_query": True,
    "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True, "vocab_size": 65024,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "apply_residual_connection_post_layernorm": False,
}  # fmt: skip
OPT_6_7B: Config = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "activation_function": "relu", "do_layer_norm_before": True, "dropout": 0.1,
    "ffn_dim": 16384, "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 50272,
    "max_position_embeddings": 2048, "word_embed_proj_dim": 4096, "_remove_final_layer_norm": False,
}  # fmt: skip
COMMAND_R = dense(
    "cohere", 40, 8192, 22528, (64, 64), architectures=["CohereForCausalLM"], layer_norm_eps=1e-05, logit_scale=0.0625,
    max_position_embeddings=131072, use_qk_norm=False, vocab_size=256000,
)  # fmt: skip
OLMO_2_7B = dense(
    "olmo2", 32, 4096, 11008, (32, 32), architectures=["Olmo2ForCausalLM"], max_position_embeddings=4096, vocab_size=100352,
    rope_theta=500000, tie_word_embeddings=False,
)  # fmt: skip
GLM_4_5_AIR = dense(
    "glm4_moe", 46, 4096, 10944, (96, 8), architectures=["Glm4MoeForCausalLM"], attention_bias=True, head_dim=128,
    first_k_dense_replace=1, max_position_embeddings=131072, moe_intermediate_size=1408, n_group=1, n_routed_experts=128,
    n_shared_experts=1, num_experts_per_tok=8, num_nextn_predict_layers=1, partial_rotary_factor=0.5, use_qk_norm=False,
    tie_word_embeddings=False, vocab_size=151552,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (FALCON_7B, 6_921_720_704),
        (OPT_6_7B, 6_658_473_984),
        (COMMAND_R, 34_980_831_232),
        (OLMO_2_7B, 7_298_617_344),
        # with an embedding and a head of the prediction module's own, 2 x 151552 x 4096
        (GLM_4_5_AIR, 110_468_824_832 - 2 * 151552 * 4096),
    ],
    ids=lambda value: str(value["model_type"]) if isinstance(value, dict) else None,
)
def test_files_of_further_families_have_their_published_totals(config: Config, published: int) -> None:
    assert parameter_counts(read(config))["total"] == published


def test_falcon_tells_its_three_shapes_apart() -> None:
    small, large = read(FALCON_7B).layers[0][0], load_model("falcon-40b").layers[0][0]
    assert (small.kv_heads, small.norms, small.parallel) == (1, 1, True)
    assert (large.kv_heads, large.norms, large.parallel) == (8, 2, True)
    with pytest.raises(InputError, match="alibi=true is not modelled for falcon"):
        read({**FALCON_7B, "alibi": True})


def test_wide_norms_of_queries_and_keys() -> None:
    """OLMo 2 norms 32 heads of 128 for queries and as many for keys; the description of a plan file keeps it."""
    model = read(OLMO_2_7B)
    assert layer_parameters(model.layers[0][0])["norms"] == 2 * 4096 + 2 * 4096
    assert model_from_document(model_document(model)) == model
    one = parameter_counts(load_model("command-r-plus-104b"))
    assert f"{one['total'] / 1e9:.1f}" == "103.8"
    alone = model_document(model)
    alone["layers"] = [{**alone["layers"][0], "qk_norm": False}]  # type: ignore[index]
    with pytest.raises(InputError, match="qk_norm_wide=true needs qk_norm"):
        model_from_document(alone)


def test_opt_models_with_projected_words_are_refused() -> None:
    with pytest.raises(InputError, match="word_embed_proj_dim=512 differs from hidden_size=4096"):
        read({**OPT_6_7B, "word_embed_proj_dim": 512})
    with pytest.raises(InputError, match="do_layer_norm_before=false is not modelled for opt"):
        read({**OPT_6_7B, "do_layer_norm_before": False})


QWEN_2_5_VL_7B = dense(
    "qwen2_5_vl", 28, 3584, 18944, (28, 4), max_position_embeddings=128000, vocab_size=152064, tie_word_embeddings=False,
    max_window_layers=28, sliding_window=32768, use_sliding_window=False, rms_norm_eps=1e-06,
)  # fmt: skip
QWEN_3_VL_30B = dense(
    "qwen3_vl_moe_text", 48, 2048, 6144, (32, 4), head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=262144, mlp_only_layers=[], decoder_sparse_step=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (
            dense(
                "granite",
                40,
                4096,
                12800,
                (32, 8),
                vocab_size=49155,
                tie_word_embeddings=True,
                embedding_multiplier=12.0,
            ),
            8_170_848_256,
        ),
        (dense("glm", 40, 4096, 13696, (32, 2), attention_bias=True, head_dim=128, vocab_size=151552), 9_399_951_360),
        (dense("glm4", 40, 4096, 13696, (32, 2), attention_bias=False, head_dim=128, vocab_size=151552), 9_400_094_720),
        (dense("ernie4_5", 18, 1024, 3072, (16, 2), head_dim=128, vocab_size=103424, use_bias=False), 360_748_032),
        (dense("nemotron", 32, 4096, 16384, (48, 8), head_dim=128, vocab_size=256000), 8_271_699_968),
    ],
    ids=["granite-3.1-8b", "glm-4-9b-hf", "glm-4-9b-0414", "ernie-4.5-0.3b", "minitron-8b"],
)
def test_counts_of_more_families(config: Config, published: int) -> None:
    """Of the weight file (glm-4-9b-hf), or by hand from the config where the card rounds: 8.17, 9.4, 0.36 and 8.27 B."""
    assert parameter_counts(read(config))["total"] == published


@pytest.mark.parametrize(
    "config",
    [
        {**QWEN_2_5_VL_7B, "vision_config": {"depth": 32, "hidden_size": 1280}},
        {
            "model_type": "qwen2_5_vl",
            "text_config": {**QWEN_2_5_VL_7B, "model_type": "qwen2_5_vl_text"},
            "vision_config": {},
        },
        {"model_type": "qwen2_vl", "text_config": {k: v for k, v in QWEN_2_5_VL_7B.items() if k != "model_type"}},
    ],
    ids=["beside", "nested", "without a type"],
)
def test_the_text_model_of_qwen_with_vision(config: Config) -> None:
    """Qwen2.5-7B's."""
    model = read(config)
    assert parameter_counts(model)["total"] == 7_615_616_512
    assert "without what reads other inputs" in model.source


def test_the_text_model_of_qwen_3_with_vision_and_experts() -> None:
    nested = read({"model_type": "qwen3_vl_moe", "text_config": QWEN_3_VL_30B, "vision_config": {"depth": 27}})
    assert parameter_counts(nested)["total"] == parameter_counts(load_model("qwen3-30b-a3b"))["total"]


def test_a_null_text_config_is_all_defaults() -> None:
    """As in transformers' Gemma3Config."""
    assert read({"model_type": "gemma3", "text_config": None}).layers == read({"model_type": "gemma3_text"}).layers
    with pytest.raises(InputError, match="qwen2_vl"):
        read({"model_type": "qwen2_vl", "text_config": [1]})
