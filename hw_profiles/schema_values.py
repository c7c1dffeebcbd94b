"""Numbers, flags, prices and curves of a hardware file, each with its source: what the parts of `schema` are made of."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shardplan.hw_profiles.machine import SourceKind

PositiveFloat = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
PositiveWhole = Annotated[int, Field(gt=0, strict=True)]
NonNegativeWhole = Annotated[int, Field(ge=0, strict=True)]
CurveFraction = Annotated[float, Field(gt=0, le=1.1, strict=True)]


class Part(BaseModel):
    """A table of a hardware file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sourced(Part):
    """A number or a curve and where it is from."""

    source: str
    source_kind: SourceKind


class Positive(Sourced):
    """A number above 0."""

    value: PositiveFloat


class NonNegative(Sourced):
    """A number, 0 or more."""

    value: NonNegativeFloat


class Whole(Sourced):
    """A whole number above 0."""

    value: PositiveWhole


class WholeOrZero(Sourced):
    """A whole number, 0 or more."""

    value: NonNegativeWhole


class Fraction(Sourced):
    """A number above 0, at most 1."""

    value: Annotated[float, Field(gt=0, le=1, strict=True)]


class AtLeastOne(Sourced):
    """A ratio of 1 or more."""

    value: Annotated[float, Field(ge=1, strict=True, allow_inf_nan=False)]


class Flag(Sourced):
    """True or false."""

    value: Annotated[bool, Field(strict=True)]


class Price(Positive):
    """An amount of money, which holds on its date."""

    date: Annotated[str, Field(strict=True)] | None = None

    @model_validator(mode="after")
    def _date_is_one(self) -> Price:
        if self.date is not None and not _is_date(self.date):
            raise ValueError(
                f'has date = {self.date!r}; write a day, month or year such as "2026-07-20", "2026-07" or "2026"'
            )
        return self


def _is_date(text: str) -> bool:
    """Whether `text` is a day, a month or a year in ISO form."""
    for form in ("%Y-%m-%d", "%Y-%m", "%Y"):
        try:
            if datetime.strptime(text, form).strftime(form) == text:
                return True
        except ValueError:
            continue
    return False


class Curve(Sourced):
    """Fractions of a peak at ascending sizes."""

    fraction: list[CurveFraction]

    def sizes(self) -> list[float]:
        """Sizes as the file gives them."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _sizes_ascend(self) -> Curve:
        sizes = self.sizes()
        if not sizes or len(sizes) != len(self.fraction):
            raise ValueError(
                f"has {len(sizes)} sizes and {len(self.fraction)} fractions; give as many of both, 1 or more"
            )
        if any(low >= high for low, high in pairwise(sizes)):
            raise ValueError("has sizes that do not ascend; sort them and remove doubles")
        return self


class GflopCurve(Curve):
    """Fraction of the peak by GFLOP of one matrix product."""

    size_gflop: list[PositiveFloat]

    def sizes(self) -> list[float]:
        """GFLOP."""
        return self.size_gflop


class MibCurve(Curve):
    """Fraction of a bandwidth by MiB moved."""

    size_mib: list[PositiveFloat]

    def sizes(self) -> list[float]:
        """MiB."""
        return self.size_mib
