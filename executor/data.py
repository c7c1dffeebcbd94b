"""Training data: the shipped text, one token a byte (vocabulary 256), in batches that do not depend on the layout."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.hw_profiles.errors import InputError

BYTE_VOCABULARY = 256

ByteArray = NDArray[np.uint8]
TokenArray = NDArray[np.int64]


def load_text() -> ByteArray:
    """The shipped text, one byte a token, shape (about 4.1e6,)."""
    packed = (resources.files("shardplan.executor") / "text" / "kjv.txt.gz").read_bytes()
    return np.frombuffer(gzip.decompress(packed), dtype=np.uint8)


def sample(text: ByteArray, *, seq: int, seed: int, step: int, index: int) -> TokenArray:
    """Sequence `index` of the global batch of `step`, shape (seq + 1,); a function of (seed, step, index) alone."""
    start = np.random.default_rng((seed, step, index)).integers(len(text) - seq)
    return text[start : start + seq + 1].astype(np.int64)


def batch(text: ByteArray, *, seq: int, seed: int, step: int, first: int, count: int) -> tuple[TokenArray, TokenArray]:
    """Inputs and targets of sequences first <= i < first + count of the global batch, each (count, seq)."""
    rows = np.stack([sample(text, seq=seq, seed=seed, step=step, index=first + i) for i in range(count)])
    return rows[:, :-1], rows[:, 1:]


class ShippedText:
    """The shipped text as the data of a run: every step draws anew, so there are no epochs."""

    def __init__(self, *, seq: int, seed: int) -> None:
        self.text, self.seq, self.seed = load_text(), seq, seed

    def batch(self, step: int, *, first: int, count: int) -> tuple[TokenArray, TokenArray]:
        """As `batch` above."""
        return batch(self.text, seq=self.seq, seed=self.seed, step=step, first=first, count=count)

    def state(self, step: int) -> dict[str, Any]:
        """What to keep after `step` was trained."""
        return {"step": step, "seed": self.seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind `state`: nothing to do, as a step's batch follows from its number and the seed; InputError for another seed."""
        if state.get("seed") != self.seed or "files" in state:
            raise InputError(
                "the training that stopped had other data or another seed", remedy="give the same job file to resume"
            )
