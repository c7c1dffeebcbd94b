"""Metrics of a run as they come, under torchtitan's names: `metrics.jsonl` (one object a row) and TensorBoard event files.

The launcher writes them from the steps of rank 0; no torch is needed. A row is due at the first step and every `interval` steps
(torchtitan's `log_freq`); its times are means since the row before, its loss and learning rate those of the step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from shardplan.executor.checkpoint_files import Progress
from shardplan.executor.measure import GIB, PHASE_NAMES, StepRecord

TENSORBOARD_FOLDER = "tb"


class MetricsFiles:
    """Writes below `folder`; call it with each step of rank 0."""

    def __init__(
        self,
        folder: Path,
        *,
        interval: int,
        steps: int,
        ranks: int,
        tokens_per_step: int,
        prediction: Mapping[str, Any],
        tensorboard: bool,
        steps_before: int = 0,
        tokens_before: int = 0,
    ) -> None:
        """`steps_before`, `tokens_before`: what the checkpoint had done that this run goes on from."""
        self.interval, self.steps, self.ranks, self.tokens_per_step = interval, steps, ranks, tokens_per_step
        self.steps_before, self.tokens_before = steps_before, tokens_before
        self.prediction = prediction
        self.since: list[StepRecord] = []
        self.file: TextIO = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.events = _event_file(folder / TENSORBOARD_FOLDER) if tensorboard else None

    def __call__(self, record: StepRecord) -> None:
        """Take one step, or the same again with its validation loss; write a row where one is due."""
        if record.validation_loss is not None:
            self._write(record.step, {"validation_metrics/loss": record.validation_loss})
            return
        self.since.append(record)
        if record.step == 1 or record.step % self.interval == 0 or record.step == self.steps:
            self._write(record.step, self.row())
            self.since.clear()

    def row(self) -> dict[str, float]:
        """The metrics of the steps since the last row."""
        last, count = self.since[-1], len(self.since)
        step_s = sum(record.step_s for record in self.since) / count
        data_s = sum(record.data_s or 0.0 for record in self.since) / count
        found: dict[str, float | None] = {
            "loss_metrics/global_avg_loss": last.loss,
            "loss_metrics/global_max_loss": last.max_loss,
            "grad_norm": last.grad_norm,
            "lr": last.learning_rate,
            "loss_scale": last.loss_scale,
            "skipped_steps": last.skipped_steps,
            "n_tokens_seen": float(self.tokens_before + (last.step - self.steps_before) * self.tokens_per_step),
            "throughput(tps)": self.tokens_per_step / step_s / self.ranks,
            **utilisation(self.prediction, step_s),
            "time_metrics/end_to_end(s)": step_s,
            "time_metrics/data_loading(s)": data_s,
            "time_metrics/data_loading(%)": 100 * data_s / step_s,
            **self._memory(),
            **self._phases(),
            "predicted/end_to_end(s)": (self.prediction.get("time") or {}).get("step_s"),
        }
        return {name: value for name, value in found.items() if value is not None}

    def _phases(self) -> dict[str, float]:
        """Means over the steps that were looked into; none where none was."""
        found: dict[str, float] = {}
        for field, (metric, _, _) in PHASE_NAMES.items():
            values = [value for record in self.since if (value := getattr(record, field)) is not None]
            if values:
                found[metric] = sum(values) / len(values)
        return found

    def _memory(self) -> dict[str, float | None]:
        capacity = (self.prediction.get("memory") or {}).get("capacity_bytes")
        found: dict[str, float | None] = {}
        for name in ("active", "reserved", "allocated", "rss"):
            peaks = [peak for record in self.since if (peak := getattr(record, f"{name}_bytes")) is not None]
            if peaks:
                found[f"memory/max_{name}(GiB)"] = max(peaks) / GIB
                if name in ("active", "reserved"):
                    found[f"memory/max_{name}(%)"] = 100 * max(peaks) / capacity if capacity else None
        return found

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        if self.events is not None:
            self.events.add(step, row)

    def close(self) -> None:
        """Everything is on disk afterwards."""
        self.file.close()
        if self.events is not None:
            self.events.close()


def tokens_before(saved: Progress, tokens_per_step: int) -> int:
    """Tokens trained before a checkpoint: counted by the loader of a job's files, else as if every step had `tokens_per_step`."""
    data = saved.data
    return data["sequences"] * data["seq"] if "sequences" in data else saved.step * tokens_per_step


def utilisation(prediction: Mapping[str, Any], step_s: float) -> dict[str, float | None]:
    """mfu(%) and tflops of a step of `step_s`: the predicted ones, which count the same work, by the ratio of the times."""
    rates, predicted_s = prediction.get("throughput") or {}, (prediction.get("time") or {}).get("step_s")
    mfu, flop_per_s = rates.get("mfu"), rates.get("model_flop_per_s_per_gpu")
    faster = predicted_s / step_s if predicted_s else None
    return {
        "mfu(%)": 100 * mfu * faster if mfu and faster else None,
        "tflops": flop_per_s * faster / 1e12 if flop_per_s and faster else None,
    }


class _EventFile:
    """A TensorBoard event file of scalars, by tensorboard's own writer (its torch counterpart wraps the same class)."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder))

    def add(self, step: int, row: Mapping[str, float]) -> None:
        # generated modules, whose names a type checker does not see
        event: Any = import_module("tensorboard.compat.proto.event_pb2")
        summary: Any = import_module("tensorboard.compat.proto.summary_pb2")
        values = [summary.Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        made = event.Event(wall_time=time.time(), step=step, summary=summary.Summary(value=values))
        self.writer.add_event(made)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _event_file(folder: Path) -> _EventFile | None:
    """None where tensorboard is not installed."""
    return _EventFile(folder) if find_spec("tensorboard") else None
