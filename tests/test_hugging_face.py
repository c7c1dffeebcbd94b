"""Weights under Hugging Face's names: a checkpoint made by transformers computes the same logits here, and comes back bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.executor.checkpoint_files import Progress, read_progress
from shardplan.executor.data import ShippedText
from shardplan.executor.hugging_face import (
    INDEX,
    check_shape,
    check_weights,
    config_of,
    expected_shapes,
    open_folder,
    unlike_its_config,
)
from shardplan.executor.job_file import parse_job
from shardplan.executor.recipe import Recipe, follow
from shardplan.executor.schedule import AdamWords
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

pytest.importorskip("safetensors", reason="weights are safetensors")
CHECKPOINT = Path(__file__).parent / "llama_checkpoint"
MIXTRAL = Path(__file__).parent / "mixtral_checkpoint"


@pytest.fixture
def copy(tmp_path):
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "copy"))


def refusal(folder: Path, model=None) -> str:
    with pytest.raises(InputError) as refused:
        check_weights(model or load_model(CHECKPOINT), open_folder(folder))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, MIXTRAL], ids=["llama", "mixtral"])
def test_the_logits_are_those_of_transformers(checkpoint):
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.transformer import build_transformer, whole
    from shardplan.executor.weights import load

    model, told = load_model(checkpoint), json.loads((checkpoint / "logits.json").read_text())
    built = build_transformer(model, seq=24, part=whole(model), seed=0, device=torch.device("cpu"))
    load(built, open_folder(checkpoint))
    found = built(torch.tensor(told["tokens"]))
    right = torch.tensor(told["logits"])
    assert (found - right).abs().max() < 1e-5 * right.abs().max()


def test_the_balance_loss_of_a_layer_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.expert_parallel import expert_layers
    from shardplan.executor.transformer import build_transformer, whole
    from shardplan.executor.weights import load

    model, told = load_model(MIXTRAL), json.loads((MIXTRAL / "logits.json").read_text())
    built = build_transformer(model, seq=24, part=whole(model), seed=0, device=torch.device("cpu"))
    load(built, open_folder(MIXTRAL))
    found = []
    for layer in expert_layers(built):
        balance = layer.router._balance_loss

        def listen(scores, sent, balance=balance):
            loss = balance(scores, sent)
            found.append(loss.item())
            return loss

        layer.router._balance_loss = listen
    built(torch.tensor(told["tokens"]))
    assert found == pytest.approx([0.02 / 2 * one for one in told["balance"]], rel=1e-5)  # the mean over two layers


def test_expected_shapes_are_those_of_the_model():
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.transformer import Transformer, whole

    for name in ("tiny", "qwen2.5-0.5b", MIXTRAL):  # the second has biases and a tied head
        model = load_model(name)
        with torch.device("meta"):
            built = Transformer(model, seq=8, part=whole(model))
        built.tie()
        assert dict(expected_shapes(model)) == {n: tuple(p.shape) for n, p in built.named_parameters()}


def test_the_written_config_describes_the_same_shapes(tmp_path):
    for name in ("tiny", "qwen2.5-0.5b", "llama-3-8b", "mixtral-8x7b"):
        model = load_model(name)
        (tmp_path / "config.json").write_text(json.dumps(config_of(model, seq=64, dtype="float32", folder=None)))
        again = load_model(tmp_path)
        assert (again.layers, again.vocab, again.tied_embeddings) == (model.layers, model.vocab, model.tied_embeddings)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("checkpoint", "words", "tied"),
    [
        (CHECKPOINT, "dp=2 zero=3", False),
        (CHECKPOINT, "pp=2", False),
        (CHECKPOINT, "pp=2", True),
        (CHECKPOINT, "cp=2 zero=1", False),
        (MIXTRAL, "dp=2 ep=2 zero=1", False),
    ],
    ids=["llama-zero3", "llama-pp2", "llama-pp2-tied", "llama-cp2", "mixtral-ep2"],
)
def test_a_spread_model_comes_back_bit_for_bit(tmp_path, checkpoint, words, tied):
    """One step at a rate that changes no fp32 value: what was read is what is written, a tied table once."""
    pytest.importorskip("torch", reason="the executor needs torch")
    import torch
    from safetensors import safe_open

    source = tied_checkpoint(tmp_path / "tied") if tied else checkpoint
    weights = {"initial": str(source), "export": str(tmp_path / "out"), "dtype": "fp32"}
    train(tmp_path, source, words, peak=1e-30, weights=weights)
    folder = open_folder(tmp_path / "out")
    assert {path.name for path in folder.files.values()} == {path.name for path in folder.path.glob("*.safetensors")}
    assert not list(tmp_path.glob("out.*"))
    assert folder.constants.rotary_base == 500_000
    check_weights(load_model(tmp_path / "out"), folder)
    with safe_open(str(source / "model.safetensors"), framework="pt") as given:
        assert set(folder.files) == set(given.keys())
        for name, path in folder.files.items():
            with safe_open(str(path), framework="pt") as written:
                assert torch.equal(written.get_tensor(name), given.get_tensor(name)), name


def make_plan(source: Path, words: str) -> Plan:
    layout = parse_layout(words)
    return Plan(
        model=load_model(source),
        job=Job(seq=16, global_batch=4, precision="fp32"),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction={"memory": {}, "time": {"step_s": 1.0}, "throughput": {}},
        search={},
        digests={},
        shardplan_version="0",
    )


def make_job(folder: Path, *, weights: dict[str, str], peak: float = 1e-3, steps: int = 1) -> dict[str, object]:
    data = {"files": [{"path": str(folder / "train.bin")}]}
    return {"steps": steps, "data": data, "learning_rate": {"peak": peak, "minimum": peak}, "weights": weights}


def train(
    folder: Path,
    source: Path,
    words: str,
    *,
    peak: float,
    weights: dict[str, str],
    steps: int = 1,
    on_step=lambda _: None,
    ends: bool = True,
    **recovery,
):
    """Train the model of `source` in a layout on tokens made up; returns the run's outcome, which must be its end unless not `ends`."""
    from shardplan.executor.launch import Recovery, run_plan
    from shardplan.executor.token_files import TokenWriter

    writer = TokenWriter(folder / "train.bin", vocabulary=32)
    writer.write([(5 * i + i // 7) % 32 for i in range(1000)])
    writer.close()
    make_plan(source, words).write(folder / "plan.json")
    job = parse_job(make_job(folder, weights=weights, peak=peak, steps=steps), place="job")
    outcome = run_plan(
        folder / "plan.json",
        device="cpu",
        steps=steps,
        out=folder / "runs",
        on_step=on_step,
        job=job,
        recovery=Recovery(**recovery),
    )
    assert outcome.error is None or not ends, outcome.error
    return outcome


@pytest.mark.distributed
@pytest.mark.parametrize("whose", ["the run's own", "somebody else's"])
def test_an_export_of_the_same_run_is_left_and_one_of_others_costs_no_weights(tmp_path, whose):
    """While the ranks train, a folder comes to lie where their weights go: by an earlier attempt of the run, or by others."""
    pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor.export_folder import part_of, run_mark

    out = tmp_path / "out"

    def finish(record) -> None:
        if record.step == 1:
            (run,) = (tmp_path / "runs").iterdir()
            out.mkdir()
            mark = run_mark(run) if whose == "the run's own" else run_mark(tmp_path)
            (out / INDEX).write_text(json.dumps({"metadata": {"run": mark}}))
            (out / "model.safetensors").write_bytes(b"whole")

    weights = {"initial": str(CHECKPOINT), "export": str(out), "dtype": "fp32"}
    outcome = train(tmp_path, CHECKPOINT, "dp=2", peak=1e-3, weights=weights, steps=60, on_step=finish, ends=False)
    assert {path.name for path in out.iterdir()} == {INDEX, "model.safetensors"}
    assert (out / "model.safetensors").read_bytes() == b"whole"
    part = part_of(out, run_mark(outcome.folder))
    if whose == "the run's own":
        assert (outcome.error, part.exists()) == (None, False)
        return
    assert outcome.error is not None
    assert f"{out}: came to lie there while the run trained" in outcome.error
    assert f"the weights are in {part}, complete" in outcome.error
    check_weights(load_model(part), open_folder(part))


@pytest.mark.distributed
def test_rotary_base_and_norm_epsilon_stay_with_a_training_that_is_resumed_without_the_folder(tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    from shardplan.executor import measure

    def losses(outcome) -> list[float]:
        return [record.loss for record in measure.read_records(outcome.folder)[0]]

    given = {"initial": str(CHECKPOINT)}
    whole = train(tmp_path, CHECKPOINT, "dp=1", peak=1e-3, weights=given, steps=3, checkpoint_every=2, keep=2)
    saved = whole.folder / "checkpoints" / "step-00000002"
    export = {"export": str(tmp_path / "out")}
    rest = train(tmp_path, CHECKPOINT, "dp=1", peak=1e-3, weights=export, steps=3, resume=saved, checkpoint_every=1)
    assert losses(rest) == losses(whole)[2:]
    assert open_folder(tmp_path / "out").constants == open_folder(CHECKPOINT).constants
    assert read_progress(rest.folder / "checkpoints" / "step-00000003").rotary_base == 500_000


def test_a_checkpoint_of_another_rotary_base_than_the_folders_is_refused():
    made = Recipe(
        seed=0,
        data=ShippedText(seq=8, seed=0),
        learning_rate=lambda _: 1.0,
        optimizer=AdamWords(),
        initial=open_folder(CHECKPOINT),
        constants=open_folder(CHECKPOINT).constants,
    )
    saved = Progress(step=1, seed=0, model="", layout="dp=1", rotary_base=10_000.0, norm_epsilon=1e-5)
    with pytest.raises(InputError, match=r"rotary_base=10000 where the training stopped, 500000 in weights.initial"):
        follow(made, saved)
    assert follow(made, replace(saved, rotary_base=None, norm_epsilon=None)) == made  # an older checkpoint
    assert follow(replace(made, initial=None), saved).constants.rotary_base == 10_000


def tied_checkpoint(folder: Path) -> Path:
    """The checkpoint with the embedding as its head too, which is then not in the file."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(str(CHECKPOINT / "model.safetensors"))
    save_file(
        {name: value for name, value in tensors.items() if name != "lm_head.weight"}, str(folder / "model.safetensors")
    )
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def test_what_does_not_belong_together_is_refused(copy):
    assert "model.embed_tokens.weight has shape [32, 16], the plan's model tiny has [256, 128]" in refusal(
        CHECKPOINT, load_model("tiny")
    )
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    assert f"{weights}: is damaged or not safetensors" in refusal(copy)
    weights.unlink()
    assert f"{weights}: no such file" in refusal(copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "llama3"
    (copy / "config.json").write_text(json.dumps(config))
    assert "rope_type='llama3' is not executed" in refusal(copy)
    (copy / "config.json").unlink()
    assert "config.json: no such file" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not executed, these models are gated with silu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not executed"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}, "heads=8, the plan's model"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}, "heads=2, the plan's model"),
        ({"model_type": "granite", "architectures": None}, "model_type='granite' is not executed; use llama, mistral"),
    ],
)
def test_equal_tensors_of_another_function_are_refused(copy, change, told):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    assert told in refusal(copy)


def test_a_config_says_silu_by_either_of_its_names_or_by_nothing(copy):
    config = json.loads((copy / "config.json").read_text())
    for said in ({"hidden_act": "swish"}, {"hidden_act": None}):
        (copy / "config.json").write_text(json.dumps({**config, **said}))
        check_weights(load_model(CHECKPOINT), open_folder(copy))


def test_what_a_start_from_random_values_does_not_compute_is_known(copy):
    assert unlike_its_config(load_model("llama-3-8b")) == []  # a preset has no file
    assert unlike_its_config(load_model(copy)) == ["rope_theta=500000.0"]
    config = json.loads((copy / "config.json").read_text())
    usual = {**config, "rope_parameters": None, "rope_theta": 10_000}
    (copy / "config.json").write_text(json.dumps(usual))
    assert unlike_its_config(load_model(copy)) == []
    (copy / "config.json").write_text(json.dumps({**usual, "hidden_act": "gelu", "rms_norm_eps": 1e-6}))
    assert unlike_its_config(load_model(copy)) == ["hidden_act=gelu", "rms_norm_eps=1e-06"]


def test_a_tensor_that_an_index_lacks_is_named(copy):
    names = [name for name in open_folder(copy).files if "layers.1.mlp.up" not in name]
    files = dict.fromkeys(names, "model.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refusal(copy)


@pytest.mark.parametrize("name", ["gpt2", "qwen3-8b", "qwen1.5-moe-a2.7b", "gemma-7b"])
def test_models_of_another_shape_are_refused(name):
    with pytest.raises(InputError, match=r"weights: model .* has .*; leave \[weights\] out"):
        check_shape(load_model(name))
