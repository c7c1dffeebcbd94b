"""Which tokens the sequences of a global batch hold: a function of the seed and the number of the sequence, of nothing else.

Sequences are counted from 0 over the whole training, so every layout with the same global batch sees the same batches, each rank
reads only its own share, and going on after sequence N needs no more than the number N.

    files      sequence n belongs to a file: each `MIX_BLOCK` sequences hold every file by its weight, in an order of their own
    documents  each epoch puts a file's documents in a new order, one behind the other
    packing    this stream is cut into windows of seq + 1 tokens that share one token with the next (Megatron's samples)
    windows    each epoch takes the windows in a new order; a rest shorter than a window is left out

A window may hold several documents and parts of them; the model attends across them, as in nanoGPT and by default in Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.executor.data import TokenArray
from shardplan.executor.token_files import TokenFile, check_ids
from shardplan.hw_profiles.errors import InputError

MIX_BLOCK = 4096
"""Sequences over which the weights hold exactly, up to one sequence a file."""
_DOCUMENTS, _MIX = 0, 1
"""Keep the random numbers of the two apart."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    epoch: int
    documents: NDArray[np.int64]
    """Numbers of the documents in the order of this epoch, (D,)."""
    ends: NDArray[np.int64]
    """Where each of them ends in the stream, (D,)."""
    windows: NDArray[np.int64]
    """Numbers of the windows in the order of this epoch."""


class FileWindows:
    """The windows of one file, epoch after epoch."""

    def __init__(
        self, file: TokenFile, *, seq: int, vocabulary: int, seed: int, number: int, shuffle: bool = True
    ) -> None:
        self.file, self.seq, self.vocabulary = file, seq, vocabulary
        self.seed, self.number, self.shuffle = seed, number, shuffle
        self.per_epoch = (len(file.tokens) - 1) // seq
        if self.per_epoch < 1:
            raise InputError(
                f"{len(file.tokens)} tokens are less than one sequence of {seq} and its last target",
                place=str(file.path),
                remedy=f"give a file of {seq + 1} tokens or more, or plan a shorter --seq",
            )
        self._order = self._make_order(0)

    def window(self, index: int) -> tuple[TokenArray, list[int]]:
        """Window `index` >= 0, counted over epochs: its tokens, shape (seq + 1,), and where documents begin in it."""
        epoch, position = divmod(index, self.per_epoch)
        if epoch != self._order.epoch:
            self._order = self._make_order(epoch)
        order = self._order
        at = int(order.windows[position]) * self.seq
        which = int(np.searchsorted(order.ends, at, side="right"))
        tokens, filled, starts = np.empty(self.seq + 1, dtype=np.int64), 0, list[int]()
        while filled <= self.seq:
            first, end = self.file.starts[order.documents[which] : order.documents[which] + 2].tolist()
            begin = end - (int(order.ends[which]) - at - filled)
            taken = self.file.tokens[begin : min(end, begin + self.seq + 1 - filled)]
            check_ids(self.file, taken, first=begin, vocabulary=self.vocabulary)
            tokens[filled : filled + len(taken)] = taken
            starts += [filled] if begin == first else []
            filled, which = filled + len(taken), which + 1
        return tokens, starts

    def _make_order(self, epoch: int) -> _Order:
        count = self.file.documents
        if self.shuffle:
            numbers = np.random.default_rng((self.seed, _DOCUMENTS, self.number, epoch))
            documents, windows = numbers.permutation(count), numbers.permutation(self.per_epoch)
        else:
            documents, windows = np.arange(count), np.arange(self.per_epoch)
        return _Order(
            epoch=epoch, documents=documents, ends=np.cumsum(np.diff(self.file.starts)[documents]), windows=windows
        )


class Loader:
    """Batches of `global_batch` sequences of `seq` tokens from `files`, drawn by `weights`."""

    def __init__(
        self,
        files: Sequence[TokenFile],
        weights: Sequence[float],
        *,
        seq: int,
        global_batch: int,
        vocabulary: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.seq, self.global_batch, self.seed = seq, global_batch, seed
        self.sources = [
            FileWindows(file, seq=seq, vocabulary=vocabulary, seed=seed, number=number, shuffle=shuffle)
            for number, file in enumerate(files)
        ]
        self.quotas = shares(weights, MIX_BLOCK)
        self.first_step, self.first_sequence = 1, 0
        self._mixed = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int, *, first: int, count: int) -> tuple[TokenArray, TokenArray]:
        """Inputs and targets of sequences first <= i < first + count of the global batch of `step`, each (count, seq)."""
        start = self.sequences_before(step) + first
        rows = np.stack([self.sequence(start + i)[0] for i in range(count)])
        return rows[:, :-1], rows[:, 1:]

    def sequence(self, number: int) -> tuple[TokenArray, list[int]]:
        """Sequence `number` of the training, shape (seq + 1,), and where documents begin in it."""
        which, index = self._place(number)
        return self.sources[which].window(index)

    def sequences_before(self, step: int) -> int:
        """Sequences that the steps before `step` took."""
        return self.first_sequence + (step - self.first_step) * self.global_batch

    def state(self, step: int) -> dict[str, Any]:
        """What to keep after `step` was trained, plain JSON: `restore` goes on behind it, whatever layout or global batch."""
        taken = self.sequences_before(step + 1)
        epochs: list[tuple[int, int]] = [
            divmod(self._taken_from(which, taken), source.per_epoch) for which, source in enumerate(self.sources)
        ]
        return {
            "step": step,
            "sequences": taken,
            "seed": self.seed,
            "seq": self.seq,
            "files": [
                {"name": s.file.path.name, "tokens": len(s.file.tokens), "quota": quota, "epoch": epoch, "position": at}
                for s, quota, (epoch, at) in zip(self.sources, self.quotas, epochs, strict=True)
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind `state`; InputError where it belongs to other data, which would not be the same training."""
        now = self.state(self.first_step - 1)
        for name in ("seed", "seq"):
            _same(name, state.get(name), now[name])
        for name in ("name", "tokens", "quota"):
            _same(
                f"files.{name}", [one.get(name) for one in state.get("files", ())], [one[name] for one in now["files"]]
            )
        self.first_step, self.first_sequence = int(state["step"]) + 1, int(state["sequences"])

    def _place(self, number: int) -> tuple[int, int]:
        """(file, window of it) of sequence `number`."""
        if len(self.sources) == 1:
            return 0, number
        block, at = divmod(number, MIX_BLOCK)
        order = self._mix(block)
        which = int(order[at])
        return which, self.quotas[which] * block + int(np.count_nonzero(order[:at] == which))

    def _taken_from(self, which: int, number: int) -> int:
        """Windows of file `which` among the first `number` sequences."""
        if len(self.sources) == 1:
            return number
        block, at = divmod(number, MIX_BLOCK)
        return self.quotas[which] * block + int(np.count_nonzero(self._mix(block)[:at] == which))

    def _mix(self, block: int) -> NDArray[np.int64]:
        if self._mixed[0] != block:
            numbers = np.random.default_rng((self.seed, _MIX, block))
            self._mixed = block, numbers.permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
        return self._mixed[1]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of `weights` that add up to `total`, each 1 or more (largest remainders get the rest)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    found = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(total - int(found.sum())):
        found[np.argmax(exact - found)] += 1
    while found.sum() > total:
        found[np.argmax(found - exact)] -= 1
    return found.tolist()


def _same(name: str, kept: object, now: object) -> None:
    if kept != now:
        raise InputError(
            f"{name}={kept!r} where the training stopped, {now!r} now", remedy="give the same data and seed to resume"
        )
