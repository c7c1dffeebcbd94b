"""What a run trains with besides its layout: batches, learning rate, optimizer words, validation. Of a job file, or without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shardplan.executor.check import plan_cluster
from shardplan.executor.checkpoint_files import Progress
from shardplan.executor.data import ShippedText, TokenArray
from shardplan.executor.export_folder import check_export
from shardplan.executor.hugging_face import USUAL_CONSTANTS, Constants, Folder, check_shape, check_weights, open_folder
from shardplan.executor.job_file import DataFile, JobFile
from shardplan.executor.loader import Loader
from shardplan.executor.loss_scale import USUAL_SCALE, ScaleWords
from shardplan.executor.schedule import AdamWords, WarmupCosine, learning_rate
from shardplan.executor.token_files import TokenFile, check_vocabulary, open_tokens
from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan

LOOKED_AT_DOCUMENTS = 2**16
"""Of an index, of which each end is somewhere else on the disk."""


class Batches(Protocol):
    """Where sequences come from."""

    def batch(self, step: int, *, first: int, count: int) -> tuple[TokenArray, TokenArray]:
        """Inputs and targets of sequences first <= i < first + count of the global batch of `step`, each (count, seq)."""
        ...

    def packed(self, step: int, *, first: int, count: int) -> tuple[TokenArray, TokenArray, TokenArray]:
        """The same, and the position of each input in its document, which begins at 0; a window's first one does too."""
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
    loss_scale: ScaleWords = USUAL_SCALE
    """Of fp16."""
    attend_across_documents: bool = True
    """False: a token sees its own document alone, whose positions begin at 0."""
    validation: Validation | None = None
    initial: Folder | None = None
    """Values to start from."""
    constants: Constants = USUAL_CONSTANTS
    """What the model computes with besides its weights: those of `initial`, or of the checkpoint that is gone on from."""
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
    initial = open_folder(job.weights.initial) if job.weights.initial else None
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
        loss_scale=ScaleWords(**job.loss_scale.model_dump()),
        attend_across_documents=job.data.attend_across_documents,
        validation=validation,
        initial=initial,
        constants=initial.constants if initial else USUAL_CONSTANTS,
        export=Path(job.weights.export) if job.weights.export else None,
        export_dtype=job.weights.dtype,
    )


def follow(recipe: Recipe, saved: Progress) -> Recipe:
    """`recipe` with what the model of a checkpoint computes with; InputError where the recipe's own weights say otherwise."""
    kept = {"rotary_base": saved.rotary_base, "norm_epsilon": saved.norm_epsilon}
    constants = replace(recipe.constants, **{name: value for name, value in kept.items() if value is not None})
    for name in kept if recipe.initial is not None else ():
        before, now = getattr(constants, name), getattr(recipe.constants, name)
        if before != now:
            raise InputError(
                f"{name}={before:g} where the training stopped, {now:g} in weights.initial",
                place="--resume",
                remedy="leave weights.initial out: the checkpoint has the weights",
            )
    return replace(recipe, constants=constants)


def check_job(plan: Plan, job: JobFile) -> None:
    """Read what can be wrong with the files of `job` before anything starts; InputError with the first complaint."""
    for one in [*job.data.files, *(job.validation.files if job.validation else ())]:
        file = _open(one)
        check_vocabulary(file, plan.model.vocab)
        _check_index(file, one)
        if not job.data.attend_across_documents:
            _check_documents(file, one)
    recipe = job_recipe(plan, job)
    if not recipe.attend_across_documents:
        _check_apart(plan)
    if recipe.initial is not None:
        check_weights(plan.model, recipe.initial)
    if recipe.export is not None:
        check_shape(plan.model)
        check_export(recipe.export)


def _check_index(file: TokenFile, said: DataFile) -> None:
    """An index tells where documents end, which the token must not deny, whether or not anything goes by it."""
    end = said.end_of_document
    if not file.plain and end is not None:
        last = file.tokens[file.starts[1 : LOOKED_AT_DOCUMENTS + 1] - 1]
        other = np.flatnonzero(last != end)
        if len(other):
            raise InputError(
                f"end_of_document={end}, but document {other[0]} of the .idx beside it ends with {last[other[0]]}",
                place=str(file.path),
                remedy="leave end_of_document out, or take the .idx away to go by the token",
            )


def _check_documents(file: TokenFile, said: DataFile) -> None:
    """A token that ends no document keeps none apart."""
    end = said.end_of_document
    if file.plain and end is not None and file.documents == 1 and int(file.tokens[-1]) != end:
        raise InputError(
            f"end_of_document={end} occurs nowhere in it, so that data.attend_across_documents=false keeps nothing apart",
            place=str(file.path),
            remedy="give the token that ends its documents, or leave end_of_document out where it is one document",
        )


def _check_apart(plan: Plan) -> None:
    """Layouts that cannot keep documents apart; what a machine lacks besides, ranks tell (`attention_kernel.check_documents`)."""
    layout, place = plan.layout, "data.attend_across_documents"
    if layout.cp > 1:
        raise InputError(
            f"keeping documents apart does not go with cp={layout.cp}",
            place=place,
            remedy="plan with cp=1, or set it to true",
        )
    if layout.attention == "flash" and plan.job.precision != "fp32" and plan_cluster(plan).gpu.device == "cuda":
        raise InputError(
            "attention=flash of a GPU cannot keep documents apart",
            place=place,
            remedy="plan with attention=auto or triton, or set it to true",
        )


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
