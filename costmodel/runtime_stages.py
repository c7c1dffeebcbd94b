"""How a runtime spreads layers over pipeline stages, as data (`[stages]` of runtimes/*.toml)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class StageRule:
    """How layers are spread over stages when the layout does not say."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    embedding_weight: float
    """Embedding counted as this many layers."""
    head_weight: float
    """Head and loss counted as this many layers."""
    weigh_ends_to_divide: bool = False
    """Count both as one layer each where only that makes the split even."""
