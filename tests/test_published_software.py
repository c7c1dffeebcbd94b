"""Rows of a published table that name their software and machine in words: what runtime, switches and profile they are estimated with."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from shardplan.costmodel.model import Model
from shardplan.costmodel.published_rows import Row, row_case
from shardplan.costmodel.published_software import software, usual_peak
from shardplan.costmodel.validation import validate_rows

RUNS = Path(__file__).parent.parent / "reports" / "published" / "runs.csv"


def row_of(source: str, **changed: str) -> Row:
    """The first published row of a source, without what the restatement added, and changed."""
    with RUNS.open(encoding="utf-8", newline="") as file:
        found = next(row for row in csv.DictReader(file) if row["source"] == source)
    return {**found, "profile": "", "memory_stages": "", **changed}


BRIDGE = "NeMo / Megatron-Bridge performance summary"
MIXTURE = {
    "experts": "128",
    "experts_per_token": "8",
    "expert_ffn": "1536",
    "hidden": "4096",
    "heads": "64",
    "kv_heads": "4",
}
BARE = "nemo/megatron-bridge + megatron-core"


def switches(row: Row) -> set[str]:
    found = software(row)
    assert found is not None
    return set(found[0].name.split("+")[1:]) - {"tp_comm_overlap", "bf16_gradients", "permute_fusion"}


@pytest.mark.parametrize(
    ("gpu", "pp", "virtual_stages", "notes", "expected"),
    [
        ("gb200", "4", "4", "release 26.06 table", {"deepep", "cuda_graph", "fused_experts", "a2a_overlap"}),
        ("gb300", "4", "4", "release 26.04.01 table", {"deepep"}),
        ("gb200", "1", "1", "release 25.09 table; (tokendrop)", {"cuda_graph"}),
        ("h100-80gb-sxm", "8", "4", "release 26.02 table", {"a2a_overlap"}),
        ("b300", "8", "1", "release 26.04 table", set[str]()),
        (
            "h100-80gb-sxm",
            "8",
            "4",
            "MLA (q_lora 1536, kv_lora 512, rope 64)",
            {"bf16_moments", "deepep", "a2a_overlap"},
        ),
    ],
)
def test_experts_of_a_recipe_by_release_and_machine(
    gpu: str, pp: str, virtual_stages: str, notes: str, expected: set[str]
) -> None:
    row = row_of(
        BRIDGE, framework=BARE, gpu=gpu, pp=pp, virtual_stages=virtual_stages, notes=notes, model="m", **MIXTURE
    )
    assert switches(row) == expected


def test_gpt_oss_dispatches_by_all_to_all_until_everything_is_fused() -> None:
    row = row_of(BRIDGE, framework=BARE, gpu="gb200", model="GPT OSS 120B", **MIXTURE)
    assert switches({**row, "notes": "release 26.04 table"}) == set()
    assert "deepep" in switches({**row, "notes": "release 26.06 table"})


@pytest.mark.parametrize(
    ("framework", "runtime"),
    [
        ("torchtitan", "fsdp2"),
        ("Megatron-LM", "megatron-2021"),
        ("megatron (main)", "megatron"),
        ("gpt-neox", "megatron-deepspeed"),
        ("picotron", "nanotron"),
        ("Hugging Face accelerate", "fsdp1"),
        ("torch DDP", "fsdp1"),
    ],
)
def test_software_that_builds_on_another_counts_as_it(framework: str, runtime: str) -> None:
    found = software(row_of("BLOOM topology sweep", framework=framework))
    assert found is not None and found[0].name.split("+")[0] == runtime


def test_what_the_row_names_wins_over_what_recipes_set() -> None:
    row = row_of(
        BRIDGE, framework=BARE, gpu="gb200", notes="release 26.06; DeepEP + 1f1b A2A overlap", model="m", **MIXTURE
    )
    assert switches(row) == {"deepep", "a2a_overlap"}
    assert switches({**row, "framework": f"{BARE} (all-to-all)"}) == set()
    assert switches({**row, "experts": ""}) == set()


def test_a_machine_that_notes_describe_has_its_profile() -> None:
    slow = row_of("SimuMax B200 Megatron runs")
    assert "49%" in slow["notes"] and row_case(slow).cluster.name == "b200-simumax"
    assert row_case({**slow, "profile": "b200-ib"}).cluster.name == "b200-ib"
    plain = row_of("Megatron-LM README Sep-2020", gpu="v100-32gb-sxm", gpus_per_node="16", network_gbps_per_gpu="")
    assert row_case(plain).cluster.name == "dgx2h-edr"


def test_recomputed_modules_that_notes_name() -> None:
    row = row_of(BRIDGE, framework=BARE, recompute="selective", **MIXTURE, layers="94", vocab="151936")
    named = {"core_attn": "selective:core_attn", "layernorm+moe_act": "selective:layernorm+act", "none": "none"}
    named |= {"mla_up_proj+mlp": "selective:mla_up_proj"}  # of the few dense layers of a model with experts
    for words, expected in named.items():
        assert row_case({**row, "notes": f"recompute modules: {words}; memory"}).layout.recompute == expected
    assert row_case({**row, "notes": ""}).layout.recompute == "selective"


def test_techniques_of_torchtune_by_row() -> None:
    row = row_of("torchtune README ablation", framework="torchtune")
    names = {"Llama-3.2-3B +Packed": {"fp32_norm", "bf16_states"}, "Llama-3.2-3B +Compile": {"compile", "bf16_states"}}
    names |= {"Llama-3.2-3B +Activation ckpt": {"compile", "chunked_loss", "bf16_states"}}
    for model, expected in names.items():
        assert switches({**row, "model": model, "notes": ""}) == expected
    assert usual_peak(row) == "allocated" and usual_peak({**row, "framework": "litgpt"}) is None
    unknown = {**row, "memory_kind": "unknown"}
    assert validate_rows([unknown])[0].predicted_peak_gib == validate_rows([row])[0].predicted_peak_gib


def mixture(**changed: str) -> Model:
    shape = {
        "layers": "12",
        "hidden": "2048",
        "heads": "16",
        "kv_heads": "8",
        "head_dim": "128",
        "ffn": "8192",
        "vocab": "64000",
    }
    shape |= {
        "experts": "24",
        "experts_per_token": "4",
        "expert_ffn": "1024",
        "shared_experts": "2",
        "notes": "",
        "model": "new",
    }
    return row_case(row_of(BRIDGE, **{**shape, "pp": "1", "virtual_stages": "1", **changed})).model


def test_a_mixture_that_the_catalog_lacks_is_made_of_the_row() -> None:
    plain = mixture()
    assert plain.name == "new" and plain.layer_count == 12 and plain.vocab == 64000
    (kind, _), *none = plain.layers
    assert not none and (kind.experts, kind.experts_per_token, kind.ffn, kind.shared_ffn) == (24, 4, 1024, 2048)
    (dense, first), (sparse, rest) = mixture(
        notes="MLA (q_lora 768, kv_lora 256, rope 64); first 3 layers dense"
    ).layers
    assert (first, rest, dense.ffn, dense.experts, sparse.experts) == (3, 9, 8192, 0, 24)
    assert (sparse.head_dim, sparse.v_head_dim, sparse.q_lora_rank, sparse.kv_lora_rank) == (192, 128, 768, 256)


def test_a_uniform_mixture_of_the_catalog_is_cut_to_the_layers_of_the_row() -> None:
    mixtral = {
        "hidden": "4096",
        "heads": "32",
        "kv_heads": "8",
        "head_dim": "128",
        "expert_ffn": "14336",
        "ffn": "14336",
    }
    cut = mixture(
        **mixtral, experts="8", experts_per_token="2", shared_experts="", layers="4", vocab="32000", model="mixtral cut"
    )
    assert cut.layer_count == 4 and cut.name == "mixtral-8x7b"
