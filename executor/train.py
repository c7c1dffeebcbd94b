"""What one rank does: build its part of the model, spread it, train it, write down what it measured.

Started by `launch.py` through torchrun: python -m shardplan.executor.train RUN_FOLDER --steps N --device cpu
After a failure torchrun starts all ranks again (--max-restarts); they go on from the newest checkpoint of the run folder.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from shardplan.executor.checkpoint import Checkpoints, choose
from shardplan.executor.checkpoint_files import CHECKPOINTS_FOLDER, clear_parts, read_progress
from shardplan.executor.compiling import is_compiled
from shardplan.executor.job_file import read_resolved
from shardplan.executor.lifetime import die_with_parent, tell_before_ending
from shardplan.executor.measure import StepRecord, append_event, host_peak_bytes
from shardplan.executor.memory_parts import device_parts, ran_out_of_memory, run_parts, told_parts
from shardplan.executor.mesh import build_mesh
from shardplan.executor.phases import PHASES
from shardplan.executor.recipe import follow, make_recipe
from shardplan.executor.recorder import RankRecorder
from shardplan.executor.start import check_world_size, restart_count, start_process_group
from shardplan.executor.trainer import Trainer
from shardplan.executor.waits import Waits
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

LOOK_EVERY = {"cpu": 1, "cuda": 10}
"""Steps from one that is looked into to the next: reading a clock costs nothing beside a step, events take launches."""

SHORT_WAIT_S = 2.0
"""For the last checkpoint, which nobody needs to be told of."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    trainer: Trainer,
    recorder: RankRecorder,
    *,
    steps: int,
    done: int = 0,
    checkpoints: Checkpoints | None = None,
    look_every: int = 1,
) -> None:
    """The loop, from step `done` + 1 to `steps`, looking into every `look_every`-th (0: none); returns when the last checkpoint and
    the exported weights are on disk."""
    held_out = trainer.recipe.validation
    waits = waits_of(trainer) if look_every else None
    for step in range(done + 1, steps + 1):
        record = run_step(trainer, step, waits if look_every and step % look_every == 0 else None)
        recorder.write(record)  # validation may take long, and it may fail
        if held_out is not None and held_out.due(step, steps=steps):
            loss = trainer.validate(held_out.data, held_out.batches, recorder.alive)
            recorder.write(replace(record, validation_loss=loss))
        if checkpoints is not None and checkpoints.due(step, steps):
            checkpoints.save(trainer.state(), trainer.progress(step))
    if checkpoints is not None:
        finish_saving(checkpoints, steps)
    recorder.write_memory(memory(trainer))
    trainer.export(recorder.folder, recorder.alive)


def finish_saving(checkpoints: Checkpoints, step: int) -> None:
    """Wait for the save of the last `step`; rank 0 tells of it where that takes longer than SHORT_WAIT_S."""
    began = time.perf_counter()
    tells = dist.get_rank() == 0 and checkpoints.busy_after(SHORT_WAIT_S)
    if tells:
        tell(checkpoints, step, "is being written: stopped before it is complete, the one before is the newest")
    checkpoints.wait()
    if tells:
        tell(checkpoints, step, f"is complete, {time.perf_counter() - began:.1f} s after training ended")


def tell(checkpoints: Checkpoints, step: int, what: str) -> None:
    """Add what became of a save to the events of the run."""
    told = f"the checkpoint of step {step} {what}"
    append_event(checkpoints.root.parent, {"step": step, "refused": [], "told": told})


def waits_of(trainer: Trainer) -> Waits:
    """What times the waits of its steps."""
    return Waits(trainer.clock, trainer.mesh, trainer.groups, compiled=is_compiled(trainer.plan.runtime))


def run_step(trainer: Trainer, step: int, waits: Waits | None = None) -> StepRecord:
    """Step `step` (from 1), looked into with `waits`. Its time runs from its batch to the end of the optimizer step, the device idle
    at both ends."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    synchronize(trainer.device)
    started, cpu_started = time.perf_counter(), time.process_time()
    scale = trainer.loss_scale.value if trainer.loss_scale else None
    with waits or nullcontext():
        loss = trainer.forward_backward(step)
        norm = trainer.update(step)
    synchronize(trainer.device)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    if trainer.loss_scale is None:
        check_finite(norm.item(), step)
    return StepRecord(
        step=step,
        loss=trainer.global_loss(loss),
        max_loss=trainer.global_max_loss(loss),
        grad_norm=norm.item() if trainer.loss_scale is None or norm.isfinite() else None,
        step_s=seconds,
        tokens_per_s=trainer.plan.job.tokens_per_step / seconds,
        learning_rate=trainer.recipe.learning_rate(step),
        data_s=trainer.data_s,
        loss_scale=scale,
        skipped_steps=trainer.loss_scale.skipped_steps if trainer.loss_scale else None,
        cpu_s=cpu_s,
        **(phase_fields(trainer.clock.read(), waits.axes) if waits else {}),
        **peak_memory(trainer.device),
    )


def check_finite(norm: float, step: int) -> None:
    """FloatingPointError for gradients that are not finite, on all ranks alike as their norm is: parameters are lost with that step, and
    what was saved before must not be replaced by them."""
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the norm of the gradients of step {step} is {norm}: training diverged; lower learning_rate.peak or "
            "optimizer.clip, and resume from a checkpoint before it"
        )


def phase_fields(found: Mapping[str, float], axes: Sequence[str]) -> dict[str, float]:
    """What a step's clock read, as fields of `StepRecord`; of `axes` without a wait, 0."""
    waits = {f"{axis}_exposed_s": found.get(axis, 0.0) for axis in axes}
    return {**{f"{phase}_s": found[phase] for phase in PHASES}, **waits}


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes since the last reset (CUDA), or of the process so far (CPU), as fields of `StepRecord`."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        kinds = {"allocated_bytes": "allocated", "active_bytes": "active", "reserved_bytes": "reserved"}
        return {field: stats[f"{kind}_bytes.all.peak"] for field, kind in kinds.items()}
    return {"rss_bytes": host_peak_bytes()}


def resume_newest(trainer: Trainer, folder: Path, source: Path | None) -> int:
    """Go on from this run's newest whole checkpoint, else from `source`; returns the steps done. Tells what it did."""
    chosen, refused = source, list[str]()  # the launcher has verified it
    if restart_count():
        chosen, refused = choose([folder / CHECKPOINTS_FOLDER, *([source] if source else [])])
    dist.barrier()  # a save begins only when what killed saves left is gone
    done = trainer.resume(chosen) if chosen else 0
    if dist.get_rank() == 0 and (chosen or restart_count()):
        at = f"resumed from step {done}" if chosen else "started again from the beginning, there is no checkpoint"
        event = {"restart": restart_count(), "step": done, "checkpoint": str(chosen) if chosen else None}
        append_event(folder, {**event, "refused": refused, "told": at})
    return done


def run_rank() -> None:
    """Everything a rank does, by its command line."""
    parser = argparse.ArgumentParser(description="one rank of a run; started by `shardplan run`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--job", type=Path, help="what to train with, as job_file.write_resolved leaves it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that no collective may exceed")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0: never")
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="one checkpoint folder")
    parser.add_argument("--profile", type=int, help="look into every N-th step; 0: none")
    given = parser.parse_args()
    die_with_parent()
    with RankRecorder(given.folder, rank=int(os.environ["RANK"])) as recorder:
        tell_before_ending(recorder.told_to_end)
        plan = Plan.read(given.folder / "plan.json")
        check_world_size(plan)
        device = start_process_group(given.device, timedelta(seconds=given.timeout))
        trainer: Trainer | None = None
        try:
            recipe = make_recipe(plan, read_resolved(given.job) if given.job else None)
            if given.resume:
                recipe = follow(recipe, read_progress(given.resume))
            trainer = Trainer(plan, build_mesh(plan.layout, device.type), device, recipe)
            if dist.get_rank() == 0 and given.checkpoint_every:
                clear_parts(given.folder / CHECKPOINTS_FOLDER)
            done = resume_newest(trainer, given.folder, given.resume)
            checkpoints = None
            if given.checkpoint_every:
                root = given.folder / CHECKPOINTS_FOLDER
                checkpoints = Checkpoints(root, every=given.checkpoint_every, keep=given.keep)
            train(
                trainer,
                recorder,
                steps=given.steps,
                done=done,
                checkpoints=checkpoints,
                look_every=LOOK_EVERY[device.type] if given.profile is None else given.profile,
            )
        except Exception as error:
            if ran_out_of_memory(error):
                recorder.details = out_of_memory(plan, trainer, device)
            raise
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()


def memory(trainer: Trainer) -> dict[str, float]:
    """Bytes of this rank by part, see `memory_parts.run_parts`, and its pipeline `stage`."""
    parts = run_parts(
        trainer.shards(),
        trainer.optimizer_states(),
        trainer.device,
        gradients_bytes=trainer.gradients_bytes,
        gathered_bytes=trainer.gathered_bytes,
        before_bytes=trainer.before_bytes,
    )
    return {"stage": trainer.mesh.get_local_rank("pp"), **parts}


def out_of_memory(plan: Plan, trainer: Trainer | None, device: torch.device) -> list[str]:
    """Predicted and actual memory of this rank's stage by part, lines of a table, printed as well."""
    if trainer is None:
        stage, actual = 0, device_parts([], [], device, gathered_bytes=0.0)
    else:
        stage, held = trainer.mesh.get_local_rank("pp"), trainer.shards()
        actual = device_parts(held, trainer.optimizer_states(), device, gathered_bytes=trainer.gathered())
    lines = told_parts(plan.prediction, stage=stage, actual=actual)
    print("\n".join(lines), file=sys.stderr, flush=True)
    return lines


def main() -> NoReturn:
    """Entry point of a rank: run, then leave at once.

    Threads of the process groups may still want the interpreter while it is being torn down, which aborts the process
    ("terminate called without an active exception", about one gloo run in ten): so there is no tearing down.
    """
    code = 0
    try:
        run_rank()
    except InputError as bad:
        print(f"{type(bad).__name__}: {bad}", file=sys.stderr)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
