"""Training goes on from a checkpoint as if it had never stopped: same layout, other layouts, after kills and restarts.

The file is also the script of a rank whose writer is slow, which a test kills during a save.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.executor import checkpoint_files, measure
from shardplan.executor.launch import Outcome, Recovery, run_plan
from shardplan.hw_profiles.load import cluster_document
from shardplan.planner.plan import Plan

STEPS = 8
LAYER = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm")
MODEL = Model(name="small", family="llama", layers=((LAYER, 4),), vocab=256, tied_embeddings=False)
PREDICTION = {"time": {"step_s": 0.1}, "throughput": {"tokens_per_s": 1.0}, "memory": {"stages": []}}


def make_plan(words: str, *, precision: str = "fp32", tied: bool = False, experts: int = 0) -> Plan:
    layout = parse_layout(words)
    kind = replace(LAYER, experts=experts, experts_per_token=2) if experts else LAYER
    return Plan(
        model=replace(MODEL, layers=((kind, 4),), tied_embeddings=tied),
        job=Job(seq=32, global_batch=4, precision=precision),
        cluster={},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction=PREDICTION,
        search={},
        digests={},
        shardplan_version="0",
    )


def run(folder: Path, words: str, *, steps: int = STEPS, on_step=lambda _: None, on_event=lambda _: None, **recovery):
    folder.mkdir(parents=True, exist_ok=True)
    precision = recovery.pop("precision", "fp32")
    model = {word: recovery.pop(word) for word in ("tied", "experts") if word in recovery}
    make_plan(words, precision=precision, **model).write(folder / "given.json")
    return run_plan(
        folder / "given.json",
        device="cpu",
        steps=steps,
        out=folder / "runs",
        on_step=on_step,
        on_event=on_event,
        recovery=Recovery(**recovery),
    )


def losses(outcome: Outcome) -> dict[int, float]:
    assert outcome.error is None, (outcome.folder / "log.txt").read_text()[-3000:]
    return {record.step: record.loss for record in measure.read_records(outcome.folder)[0]}


def saved(outcome: Outcome, step: int) -> Path:
    return outcome.folder / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 8 steps by layout words, with checkpoints of steps 4 and 8."""
    pytest.importorskip("torch", reason="the executor needs torch")
    folder = tmp_path_factory.mktemp("unbroken")
    return cache(lambda words: run(folder / words.replace(" ", "-"), words, checkpoint_every=4, keep=2))


@pytest.mark.distributed
@pytest.mark.parametrize("words", ["dp=1", "dp=2 zero=3"])
def test_resumed_in_the_same_layout_the_curve_is_the_unbroken_one(unbroken, tmp_path, words):
    whole = unbroken(words)
    found = losses(run(tmp_path, words, resume=saved(whole, 4)))
    assert list(found) == [5, 6, 7, 8]
    assert found == {step: loss for step, loss in losses(whole).items() if step > 4}  # to the last bit


@pytest.mark.distributed
@pytest.mark.parametrize("words", ["dp=1", pytest.param("dp=4 ep=2 zero=1", marks=pytest.mark.slow)])
def test_experts_are_resumed_on_other_ranks(tmp_path, words):
    pytest.importorskip("torch", reason="the executor needs torch")
    whole = run(tmp_path / "whole", "dp=2 ep=2 zero=3", steps=4, checkpoint_every=2, keep=2, experts=6)
    found = losses(run(tmp_path / "resumed", words, steps=4, resume=saved(whole, 2), experts=6))
    assert found == pytest.approx({step: loss for step, loss in losses(whole).items() if step > 2}, rel=1e-6)


OTHERS = [
    "dp=1 micro_batch=2 recompute=full",
    "tp=2 sequence_parallel=true",
    "pp=2 schedule=interleaved virtual_stages=2 recompute=selective",
    "cp=2 zero=1",
]
MORE = [
    "dp=4 zero=0",
    "dp=4 zero=2 dp_shard=2",
    "dp=2 tp=2 zero=1",
    "dp=2 pp=2 zero=3 stage_layers=3,1",
    "tp=2 pp=2 order=pp-tp-cp-dp",
    "dp=2 cp=2 zero=3 cp_kind=ulysses order=dp-cp-tp-pp",
]


@pytest.mark.distributed
@pytest.mark.parametrize("words", [*OTHERS, *(pytest.param(words, marks=pytest.mark.slow) for words in MORE)])
def test_resumed_in_another_layout_the_curve_is_the_unbroken_one(unbroken, tmp_path, words):
    whole = unbroken("dp=2 zero=3")
    found = losses(run(tmp_path, words, resume=saved(whole, 4)))
    assert found == pytest.approx({step: loss for step, loss in losses(whole).items() if step > 4}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "words", ["dp=2 pp=2 zero=1", "tp=2 pp=2 sequence_parallel=true", "dp=2 zero=0", "cp=2 zero=3"]
)
def test_saved_in_another_layout_the_curve_is_the_unbroken_one(unbroken, tmp_path, words):
    found = losses(run(tmp_path, "dp=2 zero=3", resume=saved(unbroken(words), 4)))
    assert found == pytest.approx(
        {step: loss for step, loss in losses(unbroken("dp=2 zero=3")).items() if step > 4}, rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_killed_at_any_moment_the_newest_complete_checkpoint_loads(tmp_path):
    """All ranks at once, or torchrun itself, at moments spread over saves that never pause; each run resumes the one before."""
    pytest.importorskip("torch", reason="the executor needs torch")
    source: Path | None = None
    done = 0
    for turn, delay_s in enumerate((0.3, 0.9, 1.3)):
        seen: list[int] = []

        def kill(record, turn=turn, delay_s=delay_s, seen=seen) -> None:
            seen.append(record.step)
            if len(seen) == 1:
                ranks = list(rank_processes(tmp_path).values())
                status = Path(f"/proc/{ranks[0]}/status").read_text().splitlines()
                torchrun = int(next(line for line in status if line.startswith("PPid")).split()[1])
                time.sleep(delay_s)
                for process in [torchrun] if turn % 2 else ranks:
                    os.kill(process, signal.SIGKILL)

        outcome = run(
            tmp_path / str(turn),
            "dp=2 zero=2",
            steps=100_000,
            on_step=kill,
            checkpoint_every=1,
            keep=2,
            resume=source,
        )
        assert seen[0] == done + 1
        time.sleep(1.0)
        assert rank_processes(tmp_path) == {}
        if not checkpoint_files.checkpoints(outcome.folder / "checkpoints"):
            continue  # killed before the first save was complete: the run before is as it was
        source, refused = checkpoint_files.find(outcome.folder)
        assert refused == []
        assert checkpoint_files.verify(source).step > done
        done = checkpoint_files.verify(source).step
    assert done > 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"tied": True}], ids=["bf16", "tied"])
def test_fp32_masters_and_tied_embeddings_are_saved(tmp_path, options):
    whole = run(tmp_path / "whole", "dp=2 zero=2", checkpoint_every=4, **options)
    found = losses(run(tmp_path / "resumed", "dp=2 zero=2", resume=saved(whole, 4), **options))
    assert found == {step: loss for step, loss in losses(whole).items() if step > 4}


@pytest.mark.distributed
def test_fp16_goes_on_with_the_loss_scale_it_had(tmp_path):
    whole = run(tmp_path / "whole", "dp=1", checkpoint_every=4, precision="fp16")
    second = run(tmp_path / "resumed", "dp=1", checkpoint_every=4, resume=saved(whole, 4), precision="fp16")
    assert losses(second) == {step: loss for step, loss in losses(whole).items() if step > 4}
    states = [checkpoint_files.read_progress(saved(one, 8)).loss_scale for one in (whole, second)]
    assert states[0] == states[1] == {"value": 65536, "clean_steps": 8, "patience": 2, "skipped_steps": 0}
    assert [record.loss_scale for record in measure.read_records(second.folder)[0]] == [65536] * 4


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_ranks_killed_in_the_middle_are_started_again_and_the_curve_is_the_unbroken_one(unbroken, tmp_path):
    killed: list[int] = []
    told: list[str] = []

    def kill(record) -> None:
        if record.step in (4, 7) and record.step not in killed:
            killed.append(record.step)
            os.kill(rank_processes(tmp_path)[len(killed) - 1], signal.SIGKILL)

    outcome = run(
        tmp_path, "dp=2 zero=3", on_step=kill, on_event=told.append, checkpoint_every=2, keep=2, max_restarts=2
    )
    assert losses(outcome) == losses(unbroken("dp=2 zero=3"))
    assert killed == [4, 7]
    assert [line for line in told if "resumed from step" in line or "started again" in line]
    assert [event["restart"] for event in outcome.document["resumed"]] == [1, 2]
    assert outcome.document["resumed"][1]["step"] in (4, 6)
    assert checkpoint_files.checkpoints(outcome.folder / "checkpoints")[0].name == "step-00000008"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_a_hang_ends_within_the_timeout_and_names_the_rank(tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    stopped_at: list[float] = []

    def stop(record) -> None:
        if record.step == 2:
            stopped_at.append(time.monotonic())
            os.kill(rank_processes(tmp_path)[1], signal.SIGSTOP)

    outcome = run(tmp_path, "dp=2", steps=100_000, on_step=stop, timeout_s=5.0)
    assert time.monotonic() - stopped_at[0] < 2 * 5 + 20  # two timeouts, and what a busy machine takes to end processes
    assert outcome.error is not None
    assert outcome.error.startswith("rank 1 hung after step ")
    assert rank_processes(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_a_lone_rank_that_hangs_is_ended_by_the_launcher(tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")

    def stop(record) -> None:
        if record.step == 2:
            os.kill(rank_processes(tmp_path)[0], signal.SIGSTOP)

    outcome = run(tmp_path, "dp=1", steps=100_000, on_step=stop, timeout_s=3.0)
    assert outcome.error is not None
    assert outcome.error.startswith("no step finished for 6 s; all ranks hung after step ")
    assert rank_processes(tmp_path) == {}


CPU_CLUSTER = """
name = "four-cores"
source = "this test"
source_kind = "guess"
nodes = 1
gpu = { base = "cpu" }
[node]
base = "8x4090"
gpus = 4
[network]
base = "none"
"""


@pytest.mark.distributed
def test_what_cannot_be_resumed_is_refused_in_one_line_and_a_corrupt_checkpoint_skipped(unbroken, tmp_path):
    run_folder = tmp_path / "runs" / "20260101T000000Z-copied"
    shutil.copytree(unbroken("dp=1").folder, run_folder)
    (tmp_path / "cores.toml").write_text(CPU_CLUSTER)
    plan = replace(make_plan("dp=1"), cluster=cluster_document(str(tmp_path / "cores.toml")))
    plan.write(tmp_path / "plan.json")

    def shardplan_run(*words: str | Path) -> tuple[int, list[str]]:
        code = "import sys; from shardplan.cli import main; sys.argv[0] = 'shardplan'; main()"
        options = ["run", tmp_path / "plan.json", "--out", tmp_path / "runs", *words]
        command = [sys.executable, "-c", code, *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stderr.splitlines()

    def damage(step: int) -> None:
        tensors = run_folder / "checkpoints" / f"step-{step:08d}" / "__0_0.distcp"
        tensors.write_bytes(tensors.read_bytes()[:-1])

    code, told = shardplan_run("--resume", "last", "--steps", "8")
    assert code == 1
    assert told == ["shardplan: the checkpoint is at step 8, --steps asks for 8 in all; give --steps above 8"]
    damage(8)
    code, told = shardplan_run("--resume", "last", "--steps", "5")
    assert code == 0
    assert told[0].startswith(
        f"shardplan: checkpoint {run_folder / 'checkpoints' / 'step-00000008'}: __0_0.distcp has "
    )
    assert told[0].endswith("; using step-00000004")
    assert "resumed from step 4" in told
    damage(4)
    code, told = shardplan_run("--resume", run_folder)
    assert code == 2
    assert len(told) == 1
    assert "no checkpoint is whole: checkpoint " in told[0]


@pytest.mark.distributed
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_killed_during_a_save_the_checkpoint_before_loads(tmp_path, again):
    pytest.importorskip("torch", reason="the executor needs torch")
    script = [sys.executable, __file__, str(tmp_path), "1" if again else "2"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "complete\n"
        assert process.stdout.readline() == "writing\n"
        process.kill()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"LATEST", "step-00000001", f"step-0000000{1 if again else 2}.tmp"}
    folder, refused = checkpoint_files.find(tmp_path)
    assert (folder.name, refused) == ("step-00000001", [])
    loaded = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "load"], capture_output=True, text=True, check=False
    )
    assert json.loads(loaded.stdout) == {"step": 1, "equal": True}, loaded.stderr


def rank_processes(folder: Path) -> dict[int, int]:
    """Rank -> process id of the ranks that run in a folder below `folder`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        rank = next((word.removeprefix("RANK=") for word in environment if word.startswith("RANK=")), None)
        if rank is not None and any(word.startswith(str(folder)) for word in words):
            found[int(rank)] = int(process.name)
    return found


# --- a rank with a slow disk --------------------------------------------------------------------------------------


def slow_rank(root: Path, what: str) -> None:
    """Save step 1, say so, then step `what` on a disk that never finishes; or load what is there into another model."""
    import torch
    import torch.distributed as dist

    from shardplan.executor import checkpoint
    from shardplan.executor.mesh import build_mesh
    from shardplan.executor.recipe import plain_recipe
    from shardplan.executor.trainer import Trainer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plan = make_plan("dp=1")
    mesh = build_mesh(plan.layout, "cpu")

    def trained() -> Trainer:
        trainer = Trainer(plan, mesh, torch.device("cpu"))
        trainer.forward_backward(1)
        trainer.update(1)
        return trainer

    first = trained()
    if what == "load":
        other = Trainer(plan, mesh, torch.device("cpu"), replace(plain_recipe(plan), seed=7))
        step = other.resume(checkpoint_files.find(root)[0])
        right, found = first.state(), other.state()
        equal = right.keys() == found.keys() and all(torch.equal(right[name], found[name]) for name in right)
        print(json.dumps({"step": step, "equal": equal}), flush=True)
        os._exit(0)
    saves = checkpoint.Checkpoints(root, every=1, keep=1)
    saves.save(first.state(), first.progress(1))
    first.forward_backward(2)
    first.update(2)  # while step 1 is being written
    saves.wait()
    print("complete", flush=True)

    def never_done(self, plan, planner):
        done = write(self, plan, planner)
        print("writing", flush=True)
        time.sleep(600)
        return done

    write = checkpoint.CheckpointWriter.write_data
    checkpoint.CheckpointWriter.write_data = never_done
    saves.save(first.state(), first.progress(int(what)))
    saves.wait()


if __name__ == "__main__":
    slow_rank(Path(sys.argv[1]), sys.argv[2])
