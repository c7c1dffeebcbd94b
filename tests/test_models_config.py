"""Hugging Face config.json files: defaults, old and new key names, and one clear line for each bad input."""

import json
from dataclasses import replace

import pytest

from shardplan.costmodel.model import LayerKind, parameter_counts
from shardplan.costmodel.model_config import load_model, model_digest, model_from_config
from shardplan.hw_profiles.errors import InputError

LLAMA_3_8B_OLD = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_8B_NEW = {
    key: value for key, value in LLAMA_3_8B_OLD.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")
} | {
    "dtype": "bfloat16",
    "head_dim": 128,
    "rope_parameters": {**LLAMA_3_8B_OLD["rope_scaling"], "rope_theta": 500000.0},
    "transformers_version": "5.0.0",
}
GPT2_OLD = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPT2_NEW = {
    "architectures": ["GPT2LMHeadModel"],
    "dtype": "float32",
    "hidden_size": 768,
    "max_position_embeddings": 1024,
    "model_type": "gpt2",
    "n_inner": None,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "tie_word_embeddings": True,
    "vocab_size": 50257,
}
MIXTRAL_OLD = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MIXTRAL_NEW = {"model_type": "mixtral", "max_position_embeddings": 32768, "num_experts": 8, "dtype": "bfloat16"} | {
    "router_aux_loss_coef": 0.02,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}


def read(config, folder, name="config.json"):
    path = folder / name
    path.write_text(json.dumps(config))
    return load_model(path)


def complaint(config, *, place="my/config.json") -> str:
    with pytest.raises(InputError) as error:
        model_from_config(config, name="m", place=place)
    message = str(error.value)
    assert message.startswith(f"{place}: ")
    assert "\n" not in message
    assert error.value.remedy
    return message


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (LLAMA_3_8B_OLD, "llama-3.1-8b"),
        (LLAMA_3_8B_NEW, "llama-3.1-8b"),
        (GPT2_OLD, "gpt2"),
        (GPT2_NEW, "gpt2"),
        (MIXTRAL_OLD, "mixtral-8x7b"),
        (MIXTRAL_NEW, "mixtral-8x7b"),
    ],
    ids=["llama-old", "llama-new", "gpt2-old", "gpt2-new", "mixtral-old", "mixtral-new"],
)
def test_real_files_old_and_new_style_equal_the_preset(config, preset, tmp_path):
    model, known = read(config, tmp_path), load_model(preset)
    assert replace(model, name=known.name, source=known.source) == known
    assert model_digest(model) == model_digest(known)


@pytest.mark.parametrize(
    ("model_type", "parameters", "positions"),
    [("llama", 6_738_415_616, 2048), ("gpt2", 124_439_808, 1024), ("mixtral", 46_702_792_704, 131072)],
)
def test_only_model_type_gives_the_class_defaults(model_type, parameters, positions, tmp_path):
    model = read({"model_type": model_type}, tmp_path)
    assert parameter_counts(model)["total"] == parameters
    assert model.max_positions == positions
    assert model.family == model_type


def test_gpt2_layer_and_dropout(tmp_path):
    ((kind, _),) = read({"model_type": "gpt2"}, tmp_path).layers
    assert kind == LayerKind(
        hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072, gated_mlp=False, norm="layernorm", qkv_bias=True,
        attention_output_bias=True, mlp_bias=True, rotary=False, dropout=True,
    )  # fmt: skip
    quiet = {"model_type": "gpt2", "resid_pdrop": 0.0, "attn_pdrop": 0, "embd_pdrop": 0.0, "n_inner": 1000}
    ((kind, _),) = read(quiet, tmp_path).layers
    assert (kind.dropout, kind.ffn) == (False, 1000)


def test_llama_biases_head_width_and_null_values(tmp_path):
    config = {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 100, "hidden_size": 4100}
    model = read(config | {"num_key_value_heads": None, "tie_word_embeddings": True}, tmp_path)
    ((kind, _),) = model.layers
    assert kind.qkv_bias
    assert kind.attention_output_bias
    assert kind.mlp_bias
    assert (kind.head_dim, kind.kv_heads, kind.heads, model.tied_embeddings) == (100, 32, 32, True)
    ((kind, _),) = read({"model_type": "llama", "head_dim": None}, tmp_path).layers
    assert (kind.head_dim, kind.kv_heads) == (128, 32)


def test_unknown_keys_are_ignored_as_transformers_does(tmp_path):
    assert read({"model_type": "gpt2", "hidden_dim": 1, "whatever": {"a": []}}, tmp_path).hidden == 768


@pytest.mark.parametrize(
    ("config", "key", "meant"),
    [
        ({"model_type": "llama", "num_key_value_head": 8}, "num_key_value_head=8", "num_key_value_heads"),
        ({"model_type": "llama", "Hidden_size": 64}, "Hidden_size=64", "hidden_size"),
        ({"model_type": "gpt2", "vocab_sise": 100}, "vocab_sise=100", "vocab_size"),
        ({"model_type": "mixtral", "num_local_expert": 4}, "num_local_expert=4", "num_local_experts"),
    ],
)
def test_a_key_a_letter_away_is_no_default(config, key, meant):
    message = complaint(config)
    assert f"{key} is not read, and {meant} is not given" in message
    assert f"did you mean {meant}?" in message


def test_a_key_beside_the_one_it_resembles_is_ignored(tmp_path):
    assert read({"model_type": "gpt2", "n_embd": 64, "n_embds": 3, "n_head": 4}, tmp_path).hidden == 64


@pytest.mark.parametrize("model_type", ["qwen4", "Llama", "", 3, None, ["llama"]])
def test_other_model_types_are_refused_with_the_known_ones(model_type):
    message = complaint({"model_type": model_type})
    assert f"model_type={json.dumps(model_type)}" in message
    assert "llama, gpt2, mistral" in message


def test_missing_model_type_and_not_an_object():
    assert "model_type is missing; add model_type, one of: llama, gpt2, mistral" in complaint({"hidden_size": 4})
    for value in ([1, 2], "llama", 3, None):
        assert f"{json.dumps(value)} is not a JSON object; write" in complaint(value)


@pytest.mark.parametrize("value", [0, -1, 1.5, 4096.0, True, "4096", [1], None, 2**31, 10**400, float("nan")])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_bad_shapes_name_the_field_and_the_value(key, value):
    message = complaint({"model_type": "llama", key: value})
    assert f"{key}={json.dumps(value)[:50]}" in message
    assert "write an integer from 1 to" in message


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_bad_shapes_that_may_be_left_out(key):
    for value in (0, -4, 2.5, False, "8"):
        assert f"{key}={json.dumps(value)} " in complaint({"model_type": "mixtral", key: value})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3},
            [
                "num_attention_heads=3 does not divide hidden_size=100",
                "give head_dim, or use a divisor of 100: 1, 2, 4",
            ],
        ),
        ({"model_type": "llama", "hidden_size": 100}, ["num_attention_heads=32 (the default)", "hidden_size=100"]),
        ({"model_type": "gpt2", "n_head": 5}, ["n_head=5 does not divide n_embd=768 (the default)", "divisor of 768"]),
        ({"model_type": "gpt2", "hidden_size": 70}, ["does not divide hidden_size=70", "use a divisor"]),
        (
            {"model_type": "llama", "num_key_value_heads": 5},
            ["num_key_value_heads=5 does not divide num_attention_heads=32", "1, 2, 4, 8, 16, 32"],
        ),
        ({"model_type": "mixtral", "num_attention_heads": 4}, ["num_key_value_heads=8 (the default)", "1, 2, 4"]),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            ["num_experts_per_tok=9 is more than num_local_experts=8", "from 1 to 8"],
        ),
        ({"model_type": "mixtral", "num_experts": 0}, ["num_experts=0 is out of range", "write an integer"]),
        ({"model_type": "llama", "num_hidden_layers": 20000}, ["num_hidden_layers=20000", "from 1 to 10000"]),
        ({"model_type": "gpt2", "n_embd": 8, "hidden_size": 16}, ["n_embd=8 contradicts hidden_size=16", "keep one"]),
        ({"model_type": "llama", "tie_word_embeddings": "no"}, ['tie_word_embeddings="no"', "true or false"]),
        ({"model_type": "llama", "attention_bias": 1}, ["attention_bias=1", "true or false"]),
        ({"model_type": "gpt2", "attn_pdrop": 1.5}, ["attn_pdrop=1.5", "from 0 to 1"]),
        ({"model_type": "gpt2", "attn_pdrop": True}, ["attn_pdrop=true", "from 0 to 1"]),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantization_config=", "gptq", "is not modelled", "null"],
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, ["add_cross_attention=true is not modelled"]),
        ({"model_type": "gpt2", "pruned_heads": {"0": [1]}}, ["pruned_heads=", "is not modelled"]),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            ["LlamaForSequenceClassification", "is not modelled", '["LlamaForCausalLM"]'],
        ),
        ({"model_type": "llama", "vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1, "head_dim": 2}, ["parameters"]),
        (
            {"model_type": "llama", "hidden_size": 126, "num_attention_heads": 6},
            ["head_dim", "21 wide", "make it even"],
        ),
    ],
)
def test_bad_combinations_name_values_and_remedy(config, words):
    message = complaint(config)
    assert all(word in message for word in words), message


def test_harmless_forms_of_refused_keys():
    harmless = {"quantization_config": None, "pruned_heads": {}, "architectures": None, "is_encoder_decoder": False}
    assert model_from_config({"model_type": "gpt2", **harmless}, name="m").hidden == 768
    assert model_from_config({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, name="m").hidden == 4096
