"""What a run trains with besides its layout: batches, learning rate, optimizer words, validation. Of a job file, or without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from shardplan.executor.data import ShippedText, TokenArray
from shardplan.executor.hugging_face import Folder, check_shape, check_weights, open_folder
from shardplan.executor.job_file import DataFile, JobFile
from shardplan.executor.loader import Loader
from shardplan.executor.schedule import AdamWords, WarmupCosine, learning_rate
from shardplan.executor.token_files import TokenFile, check_vocabulary, open_tokens
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan


class Batches(Protocol):
    """Where sequences come from."""

    def batch(self, step: int, *, first: int, count: int) -> tuple[TokenArray, TokenArray]:
        """Inputs and targets of sequences first <= i < first + count of the global batch of `step`, each (count, seq)."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` was trained, plain JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind `state` exactly; InputError where it belongs to other data."""
        ...


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Held-out data."""

    data: Batches
    interval: int
    """Steps from one to the next."""
    batches: int
    """Global batches each time: those of steps 1 to `batches`."""

    def due(self, step: int, *, steps: int) -> bool:
        """Whether one belongs behind `step` of `steps`."""
        return step % self.interval == 0 or step == steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    seed: int
    """Of the initial values."""
    data: Batches
    learning_rate: Callable[[int], float]
    """By step, which counts from 1."""
    optimizer: AdamWords
    validation: Validation | None = None
    initial: Folder | None = None
    """Values to start from."""
    export: Path | None = None
    """Where the trained ones go, in `export_dtype`."""
    export_dtype: str = "bf16"


def plain_recipe(plan: Plan, *, seed: int = 0) -> Recipe:
    """Without a job file: the shipped text, a short warm-up, a constant rate by the model's width."""
    return Recipe(
        seed=seed,
        data=ShippedText(seq=plan.job.seq, seed=seed),
        learning_rate=partial(learning_rate, hidden=plan.model.hidden),
        optimizer=AdamWords(),
    )


def make_recipe(plan: Plan, job: JobFile | None) -> Recipe:
    """What `job` says, or the shipped text without one."""
    return plain_recipe(plan) if job is None else job_recipe(plan, job)


def job_recipe(plan: Plan, job: JobFile) -> Recipe:
    """What `job` says, for `plan`; InputError where its files cannot be read or are too short."""
    rate = job.learning_rate
    validation = None
    if job.validation is not None:
        held_out = _loader(plan, job, job.validation.files, shuffle=False)
        _check_length(held_out, job.validation.batches)
        validation = Validation(data=held_out, interval=job.validation.interval, batches=job.validation.batches)
    return Recipe(
        seed=job.seed,
        data=_loader(plan, job, job.data.files, shuffle=job.data.shuffle),
        learning_rate=WarmupCosine(
            peak=rate.peak, minimum=rate.minimum, warmup_steps=rate.warmup_steps, decay_steps=job.decay_steps
        ),
        optimizer=AdamWords(
            betas=job.optimizer.betas,
            epsilon=job.optimizer.epsilon,
            weight_decay=job.optimizer.weight_decay,
            clip=job.optimizer.clip,
        ),
        validation=validation,
        initial=open_folder(job.weights.initial) if job.weights.initial else None,
        export=Path(job.weights.export) if job.weights.export else None,
        export_dtype=job.weights.dtype,
    )


def check_job(plan: Plan, job: JobFile) -> None:
    """Read what can be wrong with the files of `job` before anything starts; InputError with the first complaint."""
    for one in [*job.data.files, *(job.validation.files if job.validation else ())]:
        check_vocabulary(_open(one), plan.model.vocab)
    recipe = job_recipe(plan, job)
    if recipe.initial is not None:
        check_weights(plan.model, recipe.initial)
    if recipe.export is not None:
        check_shape(plan.model)
        if recipe.export.exists():
            raise InputError("exists already", place=str(recipe.export), remedy="name a new folder in weights.export")


def _loader(plan: Plan, job: JobFile, files: Sequence[DataFile], *, shuffle: bool) -> Loader:
    return Loader(
        [_open(one) for one in files],
        [one.weight for one in files],
        seq=plan.job.seq,
        global_batch=plan.job.global_batch,
        vocabulary=plan.model.vocab,
        seed=job.seed,
        shuffle=shuffle,
    )


def _open(file: DataFile) -> TokenFile:
    return open_tokens(file.path, dtype=file.dtype, end_of_document=file.end_of_document)


def _check_length(loader: Loader, batches: int) -> None:
    """A short validation file would be counted twice."""
    windows, needed = sum(source.per_epoch for source in loader.sources), batches * loader.global_batch
    if windows < needed:
        raise InputError(
            f"{windows} sequences of {loader.seq} tokens are less than the {needed} of {batches} global batches",
            place="validation.files",
            remedy=f"set validation.batches to {windows // loader.global_batch} or less"
            if windows >= loader.global_batch
            else f"hold out {loader.global_batch * loader.seq + 1} tokens or more",
        )
