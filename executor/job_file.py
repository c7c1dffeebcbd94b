"""The job file: what to train on, how long, at which rates. TOML; every key is checked, unknown ones are refused.

Paths are relative to the file. docs/training.md explains the keys; `JobFile` is the whole list, with its defaults.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shardplan.hw_profiles.errors import InputError, nearest

Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]


def _number(value: object) -> object:
    """A whole number counts as a float, nothing else does."""
    return float(value) if type(value) is int else value


def _pair(value: object) -> object:
    """A list of another length is told whole, not by the element that lacks."""
    if isinstance(value, list) and len(cast("list[object]", value)) != 2:
        raise ValueError(f"optimizer.betas = {value} is not a list of two numbers; give two numbers")
    return cast("object", value)


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Beta = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, strict=True)]
Width = Literal["uint16", "uint32"]


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataFile(Table):
    """One file of tokens."""

    path: str
    """A `.bin`, or the common name of Megatron's `.bin` and `.idx`."""
    weight: Positive = 1.0
    """Share of the sequences, relative to the other files'."""
    dtype: Width = "uint16"
    """Of a `.bin` without an `.idx`."""
    end_of_document: CountOrZero | None = None
    """Token that ends a document in a `.bin` without an `.idx`; left out: the file is one document."""


class Data(Table):
    """What is trained on."""

    files: Annotated[list[DataFile], Field(min_length=1, max_length=1000)]
    shuffle: Switch = True
    """Documents and windows in a new order each epoch."""
    attend_across_documents: Switch = True
    """Documents that share a window see the ones before them."""


class Validation(Table):
    """What the loss is measured on, apart from training."""

    files: Annotated[list[DataFile], Field(min_length=1, max_length=1000)]
    interval: Count = 100
    """Steps from one to the next; there is one after the last step too."""
    batches: Count = 4
    """Global batches each time, always the same ones."""


class LearningRate(Table):
    """Warm-up and cosine (`schedule.WarmupCosine`)."""

    peak: Positive
    minimum: NonNegative = 0.0
    warmup_steps: CountOrZero = 0
    decay_steps: Count | None = None
    """Step at which the minimum is reached; left out: the last one of the file, or of --steps where that is later."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum > self.peak:
            raise ValueError(f"minimum = {self.minimum:g} is above peak = {self.peak:g}; give a smaller minimum")
        return self


class Optimizer(Table):
    """AdamW."""

    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_pair)] = (0.9, 0.95)
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0
    """Largest norm of the gradients of a step, over all parameters."""


class LossScale(Table):
    """Of the loss under fp16 (`loss_scale.ScaleWords`)."""

    initial: Positive = 2.0**16
    window: Count = 1000
    """Steps without an overflow after which it doubles."""
    hysteresis: Count = 2
    """Overflows until it halves."""
    minimum: Positive = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum > self.initial:
            raise ValueError(f"minimum = {self.minimum:g} is above initial = {self.initial:g}; give a smaller minimum")
        return self


class Metrics(Table):
    """What is written down."""

    interval: Count = 10
    """Steps from one row of metrics to the next; the first step has one too."""
    tensorboard: Switch = True


class Weights(Table):
    """Values from and for other programs, under Hugging Face's names."""

    initial: str | None = None
    """Folder with config.json and safetensors to start from; left out: random values."""
    export: str | None = None
    """New folder for the trained ones; left out: none is written."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of what is written."""


class JobFile(Table):
    """Everything a job file may say."""

    steps: Count
    seed: CountOrZero = 0
    """Of the initial values and of the order of the data."""
    output: str = "runs"
    """Folder in which the run's folder is made."""
    data: Data
    validation: Validation | None = None
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    loss_scale: LossScale = LossScale()
    weights: Weights = Weights()
    metrics: Metrics = Metrics()

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate reaches its minimum."""
        return self.learning_rate.decay_steps or self.steps

    @model_validator(mode="after")
    def _warm_before_decay(self) -> Self:
        warm, decayed = self.learning_rate.warmup_steps, self.decay_steps
        if warm >= decayed and warm > 0:
            raise ValueError(
                f"learning_rate.warmup_steps = {warm} is not below the last step of the decay, {decayed}; "
                "give fewer warm-up steps, or more steps"
            )
        return self


def read_job(path: str | Path, *, steps: int | None = None) -> JobFile:
    """The job file `path` with its paths made absolute, `steps` in place of its own where given; InputError in one line."""
    file = Path(path)
    document = _read(file)
    if steps is not None:
        own = document.setdefault("steps", steps)
        if type(own) is int and 1 <= own < steps:  # a warm-up may be longer than the file's own
            document["steps"] = steps
    job = parse_job(document, place=str(file))
    return _absolute(job if steps is None else _up_to(job, steps), file.absolute().parent)


def _up_to(job: JobFile, steps: int) -> JobFile:
    """`job` with other `steps`: fewer of them leave the learning rate of each as it is, so that the rest can be trained later."""
    decay_steps = job.learning_rate.decay_steps or max(job.steps, steps)
    rate = job.learning_rate.model_copy(update={"decay_steps": decay_steps})
    return job.model_copy(update={"steps": steps, "learning_rate": rate})


def parse_job(document: object, *, place: str) -> JobFile:
    """`document` as a job; InputError with the first complaint."""
    try:
        return JobFile.model_validate(document)
    except ValidationError as error:
        complaints = [cast("dict[str, Any]", one) for one in error.errors(include_url=False)]
        # a misspelt key also causes a missing one
        complaints.sort(key=lambda one: one["type"] != "extra_forbidden")
        raise _told(complaints[0], place) from None


def write_resolved(job: JobFile, path: Path) -> None:
    """Keep the job with everything in it, defaults and absolute paths, as JSON: what the ranks read."""
    path.write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_resolved(path: Path) -> JobFile:
    """What `write_resolved` wrote."""
    return parse_job(json.loads(path.read_text(encoding="utf-8")), place=str(path))


def _read(path: Path) -> dict[str, Any]:
    place = str(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such job file", place=place, remedy="docs/training.md has one to start from") from None
    except OSError as bad:
        raise InputError(f"cannot be read ({bad.strerror})", place=place, remedy="give a TOML file") from None
    except UnicodeDecodeError:
        raise InputError("is not text", place=place, remedy="give a TOML file") from None
    except tomllib.TOMLDecodeError as bad:
        raise InputError(f"is not TOML ({bad})", place=place, remedy="correct the line") from None


def _absolute(job: JobFile, folder: Path) -> JobFile:
    def at(files: list[DataFile]) -> list[DataFile]:
        return [one.model_copy(update={"path": str(folder / one.path)}) for one in files]

    changes: dict[str, Any] = {"data": job.data.model_copy(update={"files": at(job.data.files)})}
    if job.validation is not None:
        changes["validation"] = job.validation.model_copy(update={"files": at(job.validation.files)})
    weights = {
        name: str(folder / value) for name in ("initial", "export") if (value := getattr(job.weights, name)) is not None
    }
    changes["weights"] = job.weights.model_copy(update=weights)
    return job.model_copy(update={**changes, "output": str(folder / job.output)})


_LIMITS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list of two numbers",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
}


def _told(complaint: dict[str, Any], place: str) -> InputError:
    keys: tuple[object, ...] = complaint["loc"]
    path = ".".join(f"{key}" for key in keys)
    value, kind, limits = complaint["input"], str(complaint["type"]), complaint.get("ctx", {})
    if kind == "extra_forbidden":
        problem, remedy = f"unknown key {path}", nearest(str(keys[-1]), _keys_at(keys[:-1]))
    elif kind == "missing":
        problem, remedy = f"{path} is missing", f"add {keys[-1]}; docs/training.md lists the keys"
    elif kind == "value_error":
        problem, _, remedy = str(complaint["msg"]).removeprefix("Value error, ").partition("; ")
    elif kind == "literal_error":
        problem, remedy = f"{path} = {value!r} is unknown", f"use {limits['expected']}"
    elif kind in ("too_short", "too_long"):
        problem, remedy = f"{path} has {len(value)} entries", "give 1 to 1000 of them"
    elif kind in _LIMITS:
        limit = f"{_LIMITS[kind]} {next(iter(limits.values())):g}"
        problem, remedy = f"{path} = {value} is not {limit}", f"give a number {limit}"
    else:
        wanted = _TYPES.get(kind, "a table" if kind.startswith("model") else "such a value")
        problem, remedy = f"{path} = {value!r} is not {wanted}", f"give {wanted}"
    return InputError(problem, place=place, remedy=remedy)


def _keys_at(keys: tuple[object, ...]) -> tuple[str, ...]:
    """Keys of the table at the dotted path `keys`."""
    here: type[BaseModel] = JobFile
    for key in keys:
        if isinstance(key, int):
            continue
        here = next(iter(_tables(here.model_fields[str(key)].annotation)))
    return tuple(here.model_fields)


def _tables(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _tables(inner)]
