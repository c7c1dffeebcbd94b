"""Files of token ids, mapped into memory: nanoGPT's plain `.bin`, and Megatron's `.bin` with an `.idx` beside it.

The `.bin` is the same in both: ids one after the other, little-endian. nanoGPT's says nothing about itself, so its width comes
from the job file and its documents from the end-of-document token. Megatron's index (megatron/core/datasets/indexed_dataset.py):

    9 bytes   MMIDIDX 0 0
    uint64    version, 1
    uint8     code of the width, `CODES`
    uint64    S, number of sequences
    uint64    D + 1, number of document indices
    int32[S]  tokens of each sequence
    int64[S]  where each sequence begins, in bytes
    int64[D+1]  first sequence of each document, then S

`TokenWriter` writes both at once: nanoGPT reads the `.bin`, Megatron the pair.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shardplan.hw_profiles.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
CODES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's codes of whole numbers; 6 and 7 are floats."""
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
"""Widths of a plain `.bin`."""
FOREIGN = {
    np.uint32(20240520).tobytes(): "llm.c's header",
    np.uint32(20240801).tobytes(): "llm.c's header",
    b"\x93NUM": "a NumPy header",
    b"PK\x03\x04": "a zip archive",
}
MOST_SEQUENCE_TOKENS = 2**31 - 1
BLOCK_TOKENS = 1 << 22
SCANNED_TOKENS = 1 << 28
"""Files up to here are checked whole against the vocabulary, larger ones in that many tokens, evenly spread."""
WIDTH_TOKENS = 1 << 16
"""First tokens of a plain file by which a wrong width shows,"""
LEAST_WIDTH_TOKENS = 64
"""at least so many,"""
LEAST_KINDS = 8
"""and so many different ones at even places: a pattern of few tokens may well repeat itself."""


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """An open file of tokens."""

    path: Path
    """Of the `.bin`."""
    tokens: NDArray[np.integer]
    """All ids in order, read from disk when they are touched, shape (T,)."""
    starts: NDArray[np.int64]
    """Where each document begins, then T, shape (D + 1,); no document is empty."""
    plain: bool = False
    """Without an index: nothing in the file tells its width."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1


def open_tokens(path: str | Path, *, dtype: str = "uint16", end_of_document: int | None = None) -> TokenFile:
    """The file `path`: a `.bin`, or the common name of a Megatron pair. An `.idx` beside the `.bin` describes it; where there
    is none, `dtype` (uint16 or uint32) and `end_of_document` (None: one document) do. Raises InputError."""
    given = Path(path)
    named = given.with_suffix("") if given.suffix in {".bin", ".idx"} else given
    # a dot in the common name is no suffix: data.v2 is data.v2.bin
    data, index = (named.with_name(named.name + suffix) for suffix in (".bin", ".idx"))
    if given.suffix not in {".bin", ".idx"} and given.is_file():
        data, index = given, given.with_name(given.name + ".idx")
    if index.is_file():
        return _open_pair(data, index)
    if given.suffix == ".idx":
        raise InputError("no such file", place=str(index), remedy="give the .bin alone, or both files of the pair")
    tokens = _map(data, _width(data, dtype))
    _check_header(data, tokens)
    return TokenFile(path=data, tokens=tokens, starts=_starts(tokens, end_of_document), plain=True)


def _width(path: Path, dtype: str) -> np.dtype[np.integer]:
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is unknown", place=str(path), remedy=f"use {' or '.join(DTYPES)}")
    return np.dtype(DTYPES[dtype])


def _map(path: Path, width: np.dtype[np.integer]) -> NDArray[np.integer]:
    size = _size(path)
    if size % width.itemsize:
        raise InputError(
            f"{size} bytes are no whole number of {width.name} tokens: truncated, or of another width",
            place=str(path),
            remedy="copy or tokenise it again, or correct dtype",
        )
    return np.memmap(path, dtype=width, mode="r")


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise InputError(
            "no such token file", place=str(path), remedy="make it with `shardplan tokenize`, or correct the path"
        ) from None
    except OSError as bad:
        raise InputError(f"cannot be read ({bad.strerror})", place=str(path), remedy="give a token file") from None
    if size == 0:
        raise InputError("is empty", place=str(path), remedy="tokenise the text again")
    return size


def _check_header(path: Path, tokens: NDArray[np.integer]) -> None:
    """A plain file has no header; these are the ones that are mistaken for tokens."""
    first = tokens[:32].tobytes()
    header = next((what for magic, what in FOREIGN.items() if first.startswith(magic)), None)
    if header:
        raise InputError(
            f"begins with {header}, not with tokens", place=str(path), remedy="give a plain .bin or Megatron's pair"
        )


def _starts(tokens: NDArray[np.integer], end: int | None) -> NDArray[np.int64]:
    """A document ends after its end-of-document token; one more begins there unless the file ends."""
    ends: list[NDArray[np.int64]] = []
    if end is not None:
        for first in range(0, len(tokens), BLOCK_TOKENS):
            ends.append(np.flatnonzero(tokens[first : first + BLOCK_TOKENS] == end) + (first + 1))
    return np.unique(np.concatenate([[0], *ends, [len(tokens)]])).astype(np.int64)


def _open_pair(data: Path, index: Path) -> TokenFile:
    place = str(index)
    size = _size(index)
    raw = np.memmap(index, dtype=np.uint8, mode="r")
    if raw[: len(MAGIC)].tobytes() != MAGIC:
        raise InputError(
            "is not an index of Megatron's indexed dataset (first bytes differ)",
            place=place,
            remedy="remove it to read the .bin alone, or make the pair again",
        )
    if size < HEADER_BYTES:
        raise InputError(f"{size} bytes are less than a header: truncated", place=place, remedy="copy it again")
    version, sequences, indices = (int(raw[at : at + 8].view("<u8")[0]) for at in (9, 18, 26))
    code = int(raw[17])
    if version != VERSION:
        raise InputError(f"version {version} is not {VERSION}", place=place, remedy="make the pair again")
    if code not in CODES:
        raise InputError(
            f"width code {code} is not one of whole numbers", place=place, remedy="make the pair again from text"
        )
    wanted = HEADER_BYTES + 12 * sequences + 8 * indices
    if size < wanted:  # a multimodal index has one byte more for each sequence
        raise InputError(
            f"{size} bytes where {sequences} sequences and {indices} document indices take {wanted}: truncated",
            place=place,
            remedy="copy it again",
        )
    at = HEADER_BYTES
    lengths = raw[at : at + 4 * sequences].view("<i4").astype(np.int64)
    pointers = raw[at + 4 * sequences : at + 12 * sequences].view("<i8")
    documents = raw[at + 12 * sequences : wanted].view("<i8")
    width = np.dtype(CODES[code])
    begins = np.concatenate([[0], np.cumsum(lengths)])
    bad = np.flatnonzero(pointers != begins[:-1] * width.itemsize)
    if (lengths < 0).any() or len(bad):
        which = int(bad[0]) if len(bad) else int(np.argmin(lengths))
        raise InputError(
            f"sequence {which} does not begin where the one before ends", place=place, remedy="make the pair again"
        )
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise InputError("document indices do not ascend from 0 to the end", place=place, remedy="make the pair again")
    size, told = _size(data), int(begins[-1]) * width.itemsize
    if size != told:
        raise InputError(
            f"{size} bytes where {index.name} says {told} ({begins[-1]} tokens of {width.name}): truncated or of another index",
            place=str(data),
            remedy="copy or make both files again",
        )
    return TokenFile(path=data, tokens=_map(data, width), starts=np.unique(begins[documents]).astype(np.int64))


def check_vocabulary(file: TokenFile, vocabulary: int) -> None:
    """InputError where the file is of another width, or an id not below `vocabulary`; looks at the whole file, of a large one at
    `SCANNED_TOKENS`."""
    if file.plain:
        _check_width(file, vocabulary)
    total = len(file.tokens)
    blocks = -(-min(total, SCANNED_TOKENS) // BLOCK_TOKENS)
    for first in np.linspace(0, max(total - BLOCK_TOKENS, 0), blocks).astype(np.int64).tolist():
        check_ids(file, file.tokens[first : first + BLOCK_TOKENS], first=first, vocabulary=vocabulary)


def _check_width(file: TokenFile, vocabulary: int) -> None:
    """InputError where the tokens are halves of wider ones: those at odd places, the high halves, are as small as the vocabulary makes
    them, the low ones are not."""
    found = file.tokens[:WIDTH_TOKENS]
    bits = 8 * found.itemsize
    most = (vocabulary - 1) >> bits
    if not _are_halves(found, most):
        return
    true_bits = 4 * bits if _are_halves(found[0::2], 0) else 2 * bits
    raise InputError(
        f"every second of the first {len(found)} tokens is {f'at most {most}' if most else 0}, as in a uint{true_bits} file read as "
        f"uint{bits}",
        place=str(file.path),
        remedy='set dtype = "uint32"' if true_bits == 32 else "write its tokens as uint16 or uint32",
    )


def _are_halves(tokens: NDArray[np.integer], most: int) -> bool:
    low, high = tokens[0::2], tokens[1::2]
    return (
        len(tokens) >= LEAST_WIDTH_TOKENS and int(high.max()) <= most and len(np.unique(low[low > most])) >= LEAST_KINDS
    )


def check_ids(file: TokenFile, ids: NDArray[np.integer], *, first: int, vocabulary: int) -> None:
    """InputError where one of `ids`, which stand at `first` of `file`, is not a token of the vocabulary."""
    if int(ids.max()) < vocabulary and int(ids.min()) >= 0:
        return
    at = int(np.flatnonzero((ids >= vocabulary) | (ids < 0))[0])
    raise InputError(
        f"token {int(ids[at])} at position {first + at} is not below the model's vocabulary of {vocabulary}",
        place=str(file.path),
        remedy="tokenise with a smaller vocabulary, plan a model with a larger one, or correct dtype",
    )


class TokenWriter:
    """Writes `path` (a `.bin`) and its `.idx`, document by document; both appear complete when it is closed."""

    def __init__(self, path: Path, *, vocabulary: int) -> None:
        self.path = path
        self.width = np.dtype("<u2" if vocabulary <= 2**16 else "<i4")
        self.lengths = array("i")
        self.document_ends = array("q", [0])
        self.tokens = 0
        self._file: BinaryIO = _part(path).open("wb")
        self.open_tokens = 0
        """Of the document that is being written."""

    @property
    def documents(self) -> int:
        """Documents that were ended."""
        return len(self.document_ends) - 1

    def write(self, ids: NDArray[np.integer] | list[int]) -> None:
        """Append to the open document."""
        self._file.write(np.asarray(ids).astype(self.width).tobytes())
        self.open_tokens += len(ids)

    def end_document(self) -> None:
        """The next ids begin another document; nothing happens where this one is empty."""
        if not self.open_tokens:
            return
        self.tokens += self.open_tokens
        while self.open_tokens:
            length = min(self.open_tokens, MOST_SEQUENCE_TOKENS)
            self.lengths.append(length)
            self.open_tokens -= length
        self.document_ends.append(len(self.lengths))

    def close(self) -> None:
        """End the last document, write the index, give both files their names."""
        self.end_document()
        self._file.close()
        index = self.path.with_suffix(".idx")
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        begins = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.width.itemsize
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.width)
        with _part(index).open("wb") as file:
            file.write(MAGIC + np.uint64(VERSION).astype("<u8").tobytes() + bytes([code]))
            file.write(np.array([len(lengths), len(self.document_ends)], dtype="<u8").tobytes())
            file.write(lengths.astype("<i4").tobytes() + begins.astype("<i8").tobytes())
            file.write(np.frombuffer(self.document_ends, dtype=np.int64).astype("<i8").tobytes())
        _part(index).replace(index)
        _part(self.path).replace(self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        _part(self.path).unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
