"""The command line as a user meets it: JSON and nothing else, exit codes, one clear line for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str, str]]

JOB = ("--cluster", "h100-ib", "--gpus", "8", "--global-batch", "64", "--seq", "4096")
KEYS = {
    "fits",
    "fits_likely",
    "rejections",
    "layout",
    "gpus",
    "runtime",
    "memory",
    "time",
    "throughput",
    "cost",
    "error_band",
    "assumptions",
}


def test_estimate_json_has_the_contract(call: Call) -> None:
    code, out, err = call("estimate", "llama-3-8b", *JOB, "--layout", "dp=8 zero=3 recompute=full", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert set(answer) >= KEYS
    assert answer["fits"] is True
    assert answer["layout"]["dp"] == 8
    assert set(answer["memory"]) == {
        "capacity_bytes",
        "allocated_peak_bytes",
        "reserved_peak_bytes",
        "device_peak_bytes",
        "host_bytes",
        "nvme_bytes",
        "stages",
    }
    assert answer["error_band"]["step_s"][0] < answer["time"]["step_s"] < answer["error_band"]["step_s"][1]


def test_estimate_refuses_with_complete_json(call: Call) -> None:
    code, out, _ = call(
        "estimate", "llama-3-8b", *JOB, "--layout", "dp=4 pp=2 zero=2", "--runtime", "megatron", "--json"
    )
    answer = json.loads(out)
    assert code == 1
    assert set(answer) >= KEYS
    assert answer["rejections"][0]["rule"] == "runtime-zero-with-pipeline"
    assert answer["time"]["step_s"] > 0  # what it would take if the runtime could
    code, out, _ = call("estimate", "llama-3-8b", *JOB, "--layout", "dp=5", "--json")
    answer = json.loads(out)
    assert code == 1
    assert set(answer) >= KEYS
    assert answer["time"] is None
    assert {r["rule"] for r in answer["rejections"]} >= {"gpus-product", "batch-divisible"}


def test_estimate_that_does_not_fit_names_stage_part_and_remedy(call: Call) -> None:
    code, out, _ = call("estimate", "llama-3-70b", *JOB, "--layout", "dp=8", "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["fits"] is False
    assert answer["fits_likely"] is False
    (one,) = answer["rejections"]
    assert one["rule"] == "device-memory"
    assert "stage 0" in one["detail"]
    assert "use more GPUs" in one["remedy"]  # 16 bytes of each of 70e9 parameters on 8 GPUs


def test_dp_defaults_to_the_gpus_that_remain(call: Call) -> None:
    _, out, _ = call("estimate", "llama-3-8b", *JOB, "--layout", "tp=2 zero=1", "--json")
    assert json.loads(out)["layout"]["dp"] == 4
    words = [w for w in JOB if w not in ("--gpus", "8")]
    _, out, _ = call("estimate", "llama-3-8b", *words, "--layout", "dp=16 tp=4 zero=1", "--json")
    assert json.loads(out)["gpus"] == 64


def test_plan_writes_a_plan_and_a_table(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, err = call("plan", "llama-3-8b", *JOB, "-o", str(path))
    assert (code, err) == (0, "")
    for word in ("tokens/s/GPU", "MFU", "headroom", "looked at", "refused by a rule", "compute"):
        assert word in out
    document = json.loads(path.read_text())
    assert document["schema"] == "shardplan/plan"
    assert document["prediction"]["fits"] is True
    code, out, _ = call("explain", str(path))
    assert code == 0
    assert "the largest loss is" in out
    code, out, _ = call("explain", str(path), "--json")
    assert json.loads(out)["fits"] is True


def test_plan_json_is_the_plan_file(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    _, out, _ = call("plan", "llama-3-8b", *JOB, "-o", str(path), "--json", "--top", "3")
    assert json.loads(out) == json.loads(path.read_text())
    assert len(json.loads(out)["search"]["ranked"]) == 3


def test_plan_from_a_config_json(call: Call, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = call("plan", str(tmp_path), *JOB, "--json")
    assert code == 0
    assert json.loads(out)["prediction"]["gpus"] == 8


def test_nothing_fits(call: Call) -> None:
    code, out, err = call("plan", "llama-3-405b", *JOB, "--json")
    told = json.loads(out)
    assert (code, err) == (1, "")
    assert told["fits"] is False
    assert told["rejections"]
    assert told["would_fit"]
    code, out, _ = call("plan", "llama-3-405b", *JOB)
    assert code == 1
    assert "what would fit instead" in out


def test_explain_own_layout(call: Call) -> None:
    code, out, _ = call("explain", "llama-3-8b", *JOB, "--layout", "dp=8 zero=3 recompute=full", "--json")
    told = json.loads(out)
    assert code == 0
    assert "best" in told["notes"][0]


MIXED = str(Path(__file__).parent.parent / "docs" / "examples" / "a100-h100.toml")
BAD = [
    (("plan", "lama-3-70b", *JOB), ("lama-3-70b", "did you mean llama-3-70b")),
    (("plan", "llama-3-8b", "--cluster", "h100ibb", *JOB[2:]), ("h100ib", "did you mean", "h100-ib")),
    (("plan", "llama-3-8b", "--cluster", "h100-ib", "--gpus", "0", *JOB[4:]), ("gpus=0", "1 or more")),
    (("plan", "llama-3-8b", "--cluster", "h100-ib", "--gpus", "-8", *JOB[4:]), ("gpus=-8",)),
    (("plan", "llama-3-8b", "--cluster", "h100-ib", "--gpus", "12", *JOB[4:]), ("gpus=12", "use 8 or 16")),
    (("plan", "llama-3-8b", "--cluster", "h100-ib", "--gpus", "many", *JOB[4:]), ("--gpus",)),
    (("plan", "llama-3-8b", "--cluster", "8x4090", "--gpus", "16", *JOB[4:]), ("needs a network", "at most 8")),
    (("plan", "llama-3-8b", *JOB[:4], "--global-batch", "0", "--seq", "4096"), ("global_batch=0",)),
    (("plan", "llama-3-8b", *JOB[:4], "--global-batch", "8", "--seq", "-1"), ("seq=-1",)),
    (("plan", "llama-3-8b", *JOB, "--precision", "fp4"), ("fp4", "not modelled")),
    (("plan", "llama-3-8b", *JOB, "--tokens", "nan"), ("tokens=nan",)),
    (("plan", "llama-3-8b", *JOB, "-o", "/tmp"), ("/tmp", "is a folder")),
    (("estimate", "llama-3-8b", *JOB, "--layout", "dp=10000000000000000000000"), ("dp=1000",)),
    (("plan", "llama-3-8b", *JOB, "--forbid", "zero=9"), ("--forbid", "zero=9")),
    (("plan", "llama-3-8b", *JOB, "--precision", "bf61"), ("bf61", "did you mean bf16")),
    (("plan", "llama-3-8b", *JOB, "--runtime", "deepsped"), ("deepsped", "did you mean deepspeed")),
    (("plan", "llama-3-8b", *JOB, "--objective", "speed"), ("speed", "throughput")),
    (("plan", "llama-3-8b", *JOB, "--fix", "tpp=2"), ("--fix", "tpp", "did you mean")),
    (("plan", "llama-3-8b", *JOB, "--forbid", "offlod"), ("--forbid", "offlod", "did you mean offload")),
    (("plan", "llama-3-8b", *JOB, "--headroom", "2"), ("headroom=2", "--headroom")),
    (("plan", "llama-3-8b", *JOB, "-o", "/nonexistent-folder/plan.json"), ("/nonexistent-folder", "create it")),
    (("plan", "llama-3-8b", "--cluster", "selene", *JOB[2:], "--objective", "cost"), ("selene", "no price", "--price")),
    (("plan", "llama-3-8b"), ("--cluster",)),
    (("plan", "llama-3-8b", *JOB, "--gpuss", "8"), ("--gpuss",)),
    (("plam",), ("plam", "plan")),
    (("estimate", "llama-3-8b", *JOB, "--layout", "dp=8 zro=3"), ("zro", "did you mean")),
    (("estimate", "llama-3-8b", *JOB, "--layout", "dp=eight"), ("dp='eight'",)),
    (("estimate", "nowhere/config.json", *JOB, "--layout", "dp=8"), ("nowhere/config.json",)),
    (("explain", "missing.json"), ("missing.json", "shardplan plan")),
    (("explain", "llama-3-8b"), ("--layout",)),
    (("explain", "llama-3-8b", "--layout", "dp=8"), ("--cluster", "--global-batch", "--seq")),
    (("run", "missing.json"), ("missing.json",)),
    (("hardware", "show", "h1000"), ("h1000", "did you mean")),
    (("models", "show", "gpt4"), ("gpt4",)),
    (("report", "missing", "-o", "somewhere"), ("missing",)),
    (("calibrate", "-o", "/nonexistent-folder/p.toml"), ("/nonexistent-folder",)),
]


@pytest.mark.parametrize(("words", "told"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_bad_input_is_one_clear_line(call: Call, words: tuple[str, ...], told: tuple[str, ...]) -> None:
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2
    for word in told:
        assert word in err


def test_cluster_file_with_a_missing_field(call: Call, tmp_path: Path) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text('name = "mine"\n')
    code, _, err = call("plan", "llama-3-8b", "--cluster", str(profile), *JOB[2:])
    assert code == 2
    assert "mine.toml" in err
    assert "missing" in err


def test_commands_without_arguments_and_version(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    assert "plan" in out
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("shardplan ")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("plan",),
        ("estimate",),
        ("explain",),
        ("run",),
        ("calibrate",),
        ("report",),
        ("bench", "estimate"),
        ("bench", "kernels"),
    ],
)
def test_help_teaches_with_an_example(call: Call, words: tuple[str, ...]) -> None:
    code, out, _ = call(*words, "--help")
    assert code == 0
    assert "Example" in out
    assert "shardplan" in out


def test_help_loads_nothing_heavy() -> None:
    """Start-up stays short because numpy, pydantic models of files, torch and plotting are imported by the commands that need them."""
    program = (
        "import sys; sys.argv = ['shardplan', '--help']\n"
        "import shardplan.cli\n"
        "try: shardplan.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'scipy', 'networkx', 'pandas', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_planning_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['shardplan', 'plan', 'llama-3-8b', *{JOB!r}, '--json']\n"
        "import shardplan.cli; shardplan.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prediction"]["fits"]


def test_a_gpu_without_bf16_gets_a_precision_the_runtime_has(call: Call) -> None:
    words = ("--cluster", "dgx2-edr", "--gpus", "16", "--global-batch", "64", "--seq", "1024")
    for runtime, precision in (("megatron", "fp16"), ("shardplan", "fp16"), ("fsdp2", "fp32")):
        code, out, _ = call("plan", "llama-3-8b", *words, "--runtime", runtime, "--json")
        assert code == 0
        assert json.loads(out)["job"]["precision"] == precision
    code, out, _ = call("estimate", "llama-3-8b", *words, "--layout", "dp=16 zero=3", "--precision", "bf16", "--json")
    assert code == 1
    assert json.loads(out)["rejections"][0]["rule"] == "gpu-precision"


@pytest.mark.parametrize("field", ["cluster", "search", "prediction", "digests", "job", "layout"])
@pytest.mark.parametrize("value", [5, None, []])
def test_damaged_plans_are_told(call: Call, tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "plan.json"
    call("plan", "llama-3-8b", *JOB, "-o", str(path))
    document = json.loads(path.read_text())
    document[field] = value
    path.write_text(json.dumps(document))
    for command in ("explain", "run"):
        code, _, err = call(command, str(path))
        assert code == 2
        assert field in err


def test_a_run_folder_that_cannot_be_made_is_told(call: Call, tmp_path: Path) -> None:
    path, blocked = tmp_path / "plan.json", tmp_path / "file"
    blocked.write_text("")
    words = ("--cluster", "localhost", "--gpus", "1", "--global-batch", "1", "--seq", "32", "--precision", "fp32")
    call("plan", "tiny", *words, "-o", str(path))
    code, _, err = call("run", str(path), "--steps", "1", "--force", "--out", str(blocked))
    assert code == 2
    assert "--out" in err
    assert "Traceback" not in err


def test_kernels_are_benchmarked_dry(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code, out, _ = call(
        "bench", "kernels", "--dry-run", "--only", "swiglu forward", "-o", str(tmp_path / "k.csv"), "--json"
    )
    assert code == 0
    answer = json.loads(out)
    assert [case["kernel"] for case in answer["cases"]] == ["device", "device", "swiglu forward"]
    if find_spec("triton") is None:
        assert any("triton is not installed" in note and "pip install" in note for note in answer["notes"])
    assert (tmp_path / "k.csv").read_text().startswith("kernel,case,provider,metric,unit,p20,p50,p80,device")
    code, _, err = call("bench", "kernels", "--dry-run", "-o", str(tmp_path / "nowhere" / "k.csv"))
    assert code == 2
    assert "does not exist; create it first" in err
    code, _, err = call("bench", "kernels", "--dry-run", "--only", "swigl2")
    assert code == 2
    assert "no case holds 'swigl2'" in err


def test_a_plan_is_explained_with_its_own_inputs(call: Call, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    call(
        "plan", "llama-3-8b", "--cluster", "h100-ib", "--gpus", "8", "--global-batch", "64", "--seq", "4096", "-o", path
    )
    for option, value in (("--runtime", "fsdp2"), ("--seq", "2048"), ("--headroom", "0.1")):
        code, _, err = call("explain", path, option, value)
        assert code == 2
        assert f"{option}: {value} is given beside a plan file" in err
    code, out, _ = call("explain", path, "--layout", "dp=8 zero=3 recompute=full", "--json")
    assert code == 0
    own = json.loads(out)
    assert own["layout"]["zero"] == 3
    assert own["subject"]["job"]["seq"] == 4096
    assert "times the step time of the best layout" in own["notes"][0]
    code, out, _ = call("explain", path, "--tokens", "1e12", "--json")
    assert code == 0
    assert json.loads(out)["subject"]["job"]["tokens"] == 1e12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--expert-imbalance 1.5", "llama-3-8b has no experts"),
        ("--capacity-factor 1.2", "llama-3-8b has no experts"),
        ("--lora-rank 8", "give --method lora or qlora"),
        ("--lora-targets attention", "give --method lora or qlora"),
    ],
)
def test_a_word_that_would_change_nothing_is_refused(call: Call, words: str, told: str) -> None:
    job = "llama-3-8b --cluster h100-ib --gpus 8 --global-batch 64 --seq 4096"
    code, _, err = call("estimate", *job.split(), "--layout", "dp=8 zero=3", *words.split())
    assert code == 2
    assert told in err


def test_why_a_v100_runs_in_fp32(call: Call) -> None:
    """torchtitan has bf16 alone, a V100 fp16 alone."""
    job = "opt-1.3b --cluster dgx1v-edr --gpus 8 --global-batch 64 --seq 2048 --runtime fsdp2 --layout"
    _, out, _ = call("estimate", *job.split(), "dp=8 zero=3")
    assert "of 16 bits runtime fsdp2 has bf16, these GPUs fp16" in " ".join(out.split())
