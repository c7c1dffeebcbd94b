"""Presets and parameter counts, checked against published totals."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardplan.cli.models import app
from shardplan.costmodel.model import LayerKind, Model, layer_parameters, parameter_counts
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.model_families import FAMILIES
from shardplan.costmodel.presets import all_presets, find_preset, preset_words
from shardplan.hw_profiles.errors import InputError

EXACT = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "gpt2": 124_439_808,
    "baby-llama2-92m": 58_479_616,
    "baby-llama2-218m": 218_155_008,
    "tiny": 853_120,
}
MEGATRON = {  # arXiv 2104.04473 Table 1: printed billions, heads, hidden, layers, another name
    "megatron-1.7b": ("1.7", 24, 2304, 24, "megatron-1.7b"),
    "megatron-3.6b": ("3.6", 32, 3072, 30, "megatron-3.6b"),
    "megatron-7.5b": ("7.5", 32, 4096, 36, "megatron-7.5b"),
    "megatron-18b": ("18.4", 48, 6144, 40, "megatron-18.4b"),
    "megatron-39b": ("39.1", 64, 8192, 48, "megatron-39.1b"),
    "megatron-76b": ("76.1", 80, 10240, 60, "megatron-76.1b"),
    "megatron-145b": ("145.6", 96, 12288, 80, "megatron-145.6b"),
    "megatron-310b": ("310.1", 128, 16384, 96, "megatron-310.1b"),
    "megatron-530b": ("529.6", 128, 20480, 105, "megatron-529.6b"),
    "megatron-1t": ("1008.0", 160, 25600, 128, "megatron-1008b"),
}


def total(name: str) -> int:
    return parameter_counts(load_model(name))["total"]


@pytest.mark.parametrize("name", all_presets())
def test_every_preset_has_its_published_total(name):
    printed = all_presets()[name].published_parameters
    if printed.endswith(" B"):
        number = printed.removesuffix(" B")
        digits = len(number.partition(".")[2])
        assert f"{total(name) / 1e9:.{digits}f}" == number
    else:
        assert total(name) == int(printed.replace(",", ""))


@pytest.mark.parametrize("name", EXACT)
def test_exact_totals(name):
    assert total(name) == EXACT[name]


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_table_and_its_formula(name):
    printed, heads, h, layers, alias = MEGATRON[name]
    model = load_model(alias)
    ((kind, count),) = model.layers
    assert (model.name, kind.heads, kind.hidden, count) == (name, heads, h, layers)
    assert (model.vocab, model.learned_positions, model.tied_embeddings, kind.dropout) == (51200, 2048, True, True)
    assert kind.norm == "layernorm"
    assert not kind.rotary
    eq2 = 12 * layers * h * h + 13 * layers * h + (model.vocab + model.learned_positions) * h
    final_norm = 2 * h  # weight and bias: the only part eq. 2 leaves out
    assert total(name) == eq2 + final_norm
    assert f"{total(name) / 1e9:.1f}" == printed


def test_every_preset_has_a_file_of_its_family_and_a_printed_total():
    assert {*EXACT, *MEGATRON, "gpt3-175b"} <= set(all_presets())
    assert {load_model(name).family for name in all_presets()} == set(FAMILIES)
    assert f"{total('gpt3-175b') / 1e9:.1f}" == "174.6"


@pytest.mark.parametrize(
    ("name", "tied", "untied"), [("baby-llama2-92m", 58_479_616, 91_653_632), ("tiny", 820_352, 853_120)]
)
def test_tied_and_untied_totals_differ_by_one_table(name, tied, untied):
    model = load_model(name)
    shapes = {"name": "x", "family": "llama", "layers": model.layers, "vocab": model.vocab}
    assert parameter_counts(Model(tied_embeddings=True, **shapes))["total"] == tied
    assert parameter_counts(Model(tied_embeddings=False, **shapes))["total"] == untied


def test_mixtral_counts_all_experts_and_the_active_ones():
    counts = parameter_counts(load_model("mixtral-8x7b"))
    assert counts["active"] == 12_879_925_248
    assert counts["router"] == 32 * 4096 * 8
    assert counts["mlp"] == 32 * 8 * 3 * 4096 * 14336


def test_parts_add_up_to_the_total():
    for name in all_presets():
        counts = dict(parameter_counts(load_model(name)))
        whole, active = counts.pop("total"), counts.pop("active")
        assert sum(counts.values()) == whole >= active > 0


def test_layer_parts_by_hand():
    kind = LayerKind(
        hidden=8, heads=4, kv_heads=2, head_dim=3, ffn=20, gated_mlp=True, norm="rmsnorm",
        qkv_bias=True, attention_output_bias=True, mlp_bias=True,
    )  # fmt: skip
    assert layer_parameters(kind) == {
        "attention": 8 * 12 + 12 + 2 * (8 * 6 + 6) + 12 * 8 + 8,
        "mlp": 2 * (8 * 20 + 20) + 20 * 8 + 8,
        "router": 0,
        "norms": 2 * 8,
    }


def test_shapes_of_grouped_query_presets():
    ((kind, layers),) = load_model("llama-3-405b").layers
    assert (kind.hidden, kind.ffn, kind.heads, kind.kv_heads, layers) == (16384, 53248, 128, 8, 126)
    ((kind, layers),) = load_model("tiny").layers
    assert (kind.hidden, kind.ffn, kind.heads, kind.kv_heads, layers) == (128, 384, 4, 2, 4)
    ((kind, layers),) = load_model("baby-llama2-218m").layers
    assert (kind.heads, kind.head_dim, layers) == (8, 128, 12)


def test_names_are_unique_lower_case_and_sourced():
    words = [word for preset in all_presets().values() for word in (preset.name, *preset.aliases)]
    assert len({word.lower() for word in words}) == len(words)
    for name, preset in all_presets().items():
        assert name == name.lower()
        assert preset.source
        assert load_model(name).source == preset.source
    assert not any("/" in word for word in preset_words())


@pytest.mark.parametrize("word", ["LLAMA-3-8B", " llama-3-8b ", "meta-llama/Meta-Llama-3-8B", "llama3-8b"])
def test_names_in_any_case_aliases_and_repository_names(word):
    assert load_model(word) == load_model("llama-3-8b")
    assert find_preset("llama-9") is None


def test_baby_llama_answers_to_both_of_its_sizes():
    assert load_model("baby-llama2-58m") == load_model("baby-llama2-92m")


@pytest.mark.parametrize(("word", "near"), [("lama-3-8b", "llama-3-8b"), ("megatron-18", "megatron-18b")])
def test_misspelt_preset_lists_the_nearest_and_says_a_path_works(word, near):
    with pytest.raises(InputError) as error:
        load_model(word)
    message = str(error.value)
    assert word in message
    assert "did you mean" in message
    assert near in message
    assert "config.json" in message
    assert "\n" not in message


def test_loading_is_quick_and_needs_no_heavy_import():
    code = (
        "import sys, shardplan.costmodel.model_config as m; m.load_model('gpt3-175b');"
        "print([x for x in ('numpy', 'pydantic', 'torch', 'rich', 'pandas') if x in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    start = time.perf_counter()
    for name in all_presets():
        load_model(name)
    assert time.perf_counter() - start < 1.0  # a few ms; the wide margin is for a busy machine


def run_cli(*words: str):
    return CliRunner().invoke(app, list(words))


def test_cli_list_names_every_preset():
    result = run_cli("list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in all_presets())
    rows = json.loads(run_cli("list", "--json").stdout)["models"]
    assert {row["name"]: row["parameters"] for row in rows} == {name: total(name) for name in all_presets()}
    assert all(row["source"] for row in rows)


def test_cli_show_prints_parts_and_source():
    result = run_cli("show", "Mixtral-8x7B")
    assert result.exit_code == 0
    for word in ("46,702,792,704", "12,879,925,248", "router", "arXiv 2401.04088", "not in megatron-2021: experts"):
        assert word in result.stdout.replace("\n", " ")
    assert "91,653,632" in run_cli("show", "baby-llama2-92m").stdout


def test_cli_list_is_grouped_by_family_and_says_what_layers_have():
    lines = [line.strip() for line in run_cli("list").stdout.splitlines()]
    assert [line for line in lines if line in FAMILIES and line != "gpt2"] == [
        name for name in FAMILIES if name != "gpt2"
    ]
    assert any(line.startswith("deepseek-v3 ") and "256 experts, 8 a token, latent attention" in line for line in lines)
    assert any(line.startswith("gpt-oss-20b") and "window 128 in 12" in line for line in lines)


def test_cli_show_tells_kinds_of_layers_their_order_and_modules():
    shown = run_cli("show", "gemma-3-27b").stdout
    assert "52 layers     10 layers" in shown
    assert "order of the layers: 5 of the 52, 1 of the 10, and so on" in shown
    shown = " ".join(run_cli("show", "deepseek-v3-mtp").stdout.split())
    for words in ("3 layers 58 layers 1 prediction module", "queries 1,536, keys and values 512", "mtp 11,610,068,224"):
        assert words in shown
    answer = json.loads(run_cli("show", "deepseek-v3-mtp", "--json").stdout)
    assert answer["published_parameters"] == "683 B"
    assert answer["runtimes_lack"]["nanotron"] == ["latent attention", "expert biases", "multi-token prediction"]


def test_cli_show_json_is_json_only():
    answer = json.loads(run_cli("show", "gpt2", "--json").stdout)
    assert answer["parameters"]["total"] == EXACT["gpt2"]
    assert answer["untied_total"] == EXACT["gpt2"] + 50257 * 768
    assert answer["model"]["layers"][0]["count"] == 12
    assert len(answer["digest"]) == 64


def test_cli_leaves_input_errors_to_the_caller():
    result = run_cli("show", "lama-3-8b")
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize("command", ["list", "show"])
def test_cli_help_has_an_example(command):
    assert "Example: shardplan models" in run_cli(command, "--help").stdout


def test_separators_of_a_name_may_differ_unless_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word, name in (
        ("gpt-2", "gpt2"),
        ("GPT 2 XL", "gpt2-xl"),
        ("llama 2 7b", "llama-2-7b"),
        ("Qwen3_8B", "qwen3-8b"),
    ):
        found = find_preset(word)
        assert found is not None and found.name == name
    assert find_preset("llama-27b") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-2").mkdir()
    assert find_preset("gpt-2") is None and find_preset("gpt2") is not None
