"""Text to token files: `shardplan tokenize`. Inputs are streamed, so they may be larger than memory.

    FOLDER/train.bin, train.idx            the tokens; also what nanoGPT (the .bin) and Megatron (the pair) read
    FOLDER/validation.bin, validation.idx  the last documents, when a share was asked for
    FOLDER/tokenizer.json                  the tokenizer, trained or given
    FOLDER/tokens.json                     counts, width, vocabulary, end-of-document token

A line of JSONL is a document; so is a whole text file. Long text is encoded in pieces that end behind a line break between two
words, where byte-level tokenizers (GPT-2's, Llama 3's, those trained here) cut anyway.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from shardplan.executor.token_files import TokenFile, TokenWriter, open_tokens
from shardplan.hw_profiles.errors import InputError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<|eot|>", "[EOS]", "[SEP]")
"""End-of-document tokens of published tokenizers, in the order in which they are looked for."""
LINE_SUFFIXES = {".jsonl", ".ndjson"}
BYTES = 256
PIECE_CHARACTERS = 1 << 16
TRAINING_CHARACTERS = 1 << 12
"""Of a piece that a tokenizer is trained on: the library reads 256 ahead."""
CHARACTERS_AT_ONCE = 1 << 20
"""Encoded together: the library holds some 300 bytes for each until they are written."""
COPIED_TOKENS = 1 << 22
_CUTS = (
    (re.compile(r"(?<=\S)\n(?=\S)"), 1),
    (re.compile(r"(?<=\S)(?= \S)"), 4),
    (re.compile(r"(?s).(?=.)"), 16),
)
"""Where a document is cut, and from how many times the size of a piece on: behind a line, before a word, anywhere."""

Piece = tuple[str, bool]
"""Text, and whether it ends its document."""


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """What was made, as `tokens.json` says it."""

    tokens: int
    documents: int
    vocabulary: int
    """Ids are below it: what a model needs."""
    end_of_document: int
    """Id of the token behind every document."""
    dtype: str
    files: dict[str, dict[str, int]]
    """File name -> tokens and documents."""


def tokenize_files(
    inputs: Sequence[Path],
    folder: Path,
    *,
    tokenizer: Path | None = None,
    vocabulary: int = 32_000,
    text_field: str = "text",
    end: str | None = None,
    validation_fraction: float = 0.0,
    tell: Callable[[str, int], None] = lambda _phase, _count: None,
) -> Tokenized:
    """Make token files of `inputs` in `folder` with the tokenizer file, or one trained on them; `tell` hears of progress."""
    _check_inputs(inputs, folder)
    if next(pieces(inputs, text_field), None) is None:
        raise _no_text(inputs)
    folder.mkdir(parents=True, exist_ok=True)
    found = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(inputs, vocabulary, text_field)
    end_id = end_of_document(found, end, place=str(tokenizer or "the trained tokenizer"))
    size = max(found.get_vocab_size(with_added_tokens=True), max(found.get_vocab().values()) + 1)
    writer = TokenWriter(folder / "train.bin", vocabulary=size)
    try:
        _write(writer, found, pieces(inputs, text_field), end_id, tell)
        if not writer.tokens:  # a tokenizer may drop what it gets
            raise _no_text(inputs)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    found.save(str(folder / "tokenizer.json"))
    files = {"train": open_tokens(folder / "train.bin")}
    if validation_fraction > 0:
        files = _hold_out(files["train"], validation_fraction, size)
    made = Tokenized(
        tokens=writer.tokens,
        documents=writer.documents,
        vocabulary=size,
        end_of_document=end_id,
        dtype=writer.width.name,
        files={f"{name}.bin": {"tokens": len(one.tokens), "documents": one.documents} for name, one in files.items()},
    )
    (folder / "tokens.json").write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
    return made


def _no_text(inputs: Sequence[Path]) -> InputError:
    told = "holds no text" if len(inputs) == 1 else "hold no text"
    return InputError(told, place=", ".join(map(str, inputs)), remedy="give files with text")


def load_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json` as Hugging Face's tokenizers library writes it; InputError where it is none."""
    from tokenizers import Tokenizer

    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise InputError("no such file", place=str(path), remedy="give a tokenizer.json, or leave --tokenizer out")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as bad:  # the library raises plain Exception
        raise InputError(f"is not a tokenizer ({bad})", place=str(path), remedy="give a tokenizer.json") from None


def train_tokenizer(inputs: Sequence[Path], vocabulary: int, text_field: str = "text") -> Tokenizer:
    """A byte-level BPE (GPT-2's kind) of at most `vocabulary` tokens, trained on `inputs`.

    With a token for each of the 256 bytes any text survives encoding and decoding. A vocabulary too small for that has tokens for
    the bytes of `inputs` only, the rest is `UNKNOWN`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    every_byte = vocabulary > BYTES
    special = [END_OF_DOCUMENT] if every_byte else [END_OF_DOCUMENT, UNKNOWN]
    made = Tokenizer(models.BPE() if every_byte else models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if every_byte else [],
        show_progress=False,
    )
    made.train_from_iterator((text for text, _ in pieces(inputs, text_field, TRAINING_CHARACTERS)), trainer)
    if made.get_vocab_size() > vocabulary:
        raise InputError(
            f"--vocab {vocabulary} has no room for the {made.get_vocab_size()} bytes and special tokens of the text",
            remedy=f"use {made.get_vocab_size()} or more",
        )
    return made


def end_of_document(tokenizer: Tokenizer, wanted: str | None, *, place: str) -> int:
    """Id of the token that ends documents: `wanted`, else the first of `KNOWN_ENDS` that the tokenizer has."""
    for name in [wanted] if wanted else KNOWN_ENDS:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    if wanted:
        known = [token for token in KNOWN_ENDS if tokenizer.token_to_id(token) is not None]
        raise InputError(
            f"has no token {wanted!r}", place=place, remedy=f"use {' or '.join(known)}" if known else "name one it has"
        )
    raise InputError(
        "has none of the usual end-of-document tokens",
        place=place,
        remedy="name one of its tokens by --end-of-document",
    )


def pieces(inputs: Iterable[Path], text_field: str, longest: int | None = None) -> Iterator[Piece]:
    """The text of `inputs` in order, in pieces of about `longest` characters, PIECE_CHARACTERS unless given."""
    size = longest or PIECE_CHARACTERS
    for path in inputs:
        try:
            with _open_text(path) as file:
                yield from _lines(file, path, text_field, size) if _is_lines(path) else _cut(file, size)
        except UnicodeDecodeError as bad:
            raise InputError(f"is not UTF-8 ({bad.reason})", place=str(path), remedy="convert it to UTF-8") from None
        except (OSError, EOFError) as bad:
            why = getattr(bad, "strerror", None) or bad
            raise InputError(f"cannot be read ({why})", place=str(path), remedy="give a text or JSONL file") from None


def _is_lines(path: Path) -> bool:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower() in LINE_SUFFIXES


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")  # line ends are kept as they are


def _lines(file: TextIO, path: Path, text_field: str, size: int) -> Iterator[Piece]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            document: Any = json.loads(line)
        except json.JSONDecodeError as bad:
            raise InputError(f"is not JSON ({bad.msg})", place=place, remedy="give one JSON object a line") from None
        if not isinstance(document, dict):
            raise InputError("is no JSON object", place=place, remedy="give one JSON object a line")
        fields = cast("dict[str, object]", document)
        if text_field not in fields:
            raise InputError(
                f"has no field {text_field!r}",
                place=place,
                remedy=f"name its field by --text-field; {nearest(text_field, fields)}",
            )
        text = fields[text_field]
        if not isinstance(text, str):
            raise InputError(
                f"field {text_field!r} is no text", place=place, remedy="name another field by --text-field"
            )
        yield from _cut(io.StringIO(text, newline=""), size)


def _cut(file: TextIO, size: int) -> Iterator[Piece]:
    """One document in pieces of about `size` characters."""
    held = ""
    while more := file.read(size):
        held += more
        # as often as it takes: what is held must not grow with the document
        while (end := _end_of_piece(held, size)) is not None:
            yield held[:end], False
            held = held[end:]
    if held:
        yield held, True


def _end_of_piece(held: str, size: int) -> int | None:
    """Where the first piece of `held` ends; None where more text should be read first."""
    for pattern, longest in _CUTS:
        cut = pattern.search(held, size // 2) if len(held) > longest * size else None
        if cut is not None:
            return cut.end()
    return None


def _write(
    writer: TokenWriter, tokenizer: Tokenizer, text: Iterator[Piece], end_id: int, tell: Callable[[str, int], None]
) -> None:
    for some in _batches(text):
        for (_, ends), ids in zip(some, encode(tokenizer, [piece for piece, _ in some]), strict=True):
            found = np.asarray(ids, dtype=np.int64)
            for part in np.split(found, np.flatnonzero(found == end_id) + 1):
                _write_part(writer, part, end_id)
            if ends and writer.open_tokens:
                _write_part(writer, np.array([end_id]), end_id)
        tell("tokens", writer.tokens)


def _batches(text: Iterator[Piece]) -> Iterator[list[Piece]]:
    some: list[Piece] = []
    characters = 0
    for piece in text:
        some.append(piece)
        characters += len(piece[0]) + 100  # a short line costs too
        if characters > CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _write_part(writer: TokenWriter, part: NDArray[np.int64], end_id: int) -> None:
    """Tokens of one document; the text itself may say where it ends, twice in a row too."""
    ends = len(part) > 0 and part[-1] == end_id
    if ends and len(part) == 1 and not writer.open_tokens:
        return
    writer.write(part)
    if ends:
        writer.end_document()


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without the tokens that a post-processor would put around it."""
    return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _hold_out(whole: TokenFile, fraction: float, vocabulary: int) -> dict[str, TokenFile]:
    """Move the last `fraction` of the tokens to validation.bin, by whole documents; of a single document its end."""
    total, folder = len(whole.tokens), whole.path.parent
    cut = round(total * (1 - fraction))
    if whole.documents > 1:
        inner = whole.starts[1:-1]
        cut = int(inner[abs(inner - cut).argmin()])
    cut = min(max(cut, 1), total - 1)
    for name, first, end in (("validation", cut, total), ("rest", 0, cut)):
        writer = TokenWriter(folder / f"{name}.bin", vocabulary=vocabulary)
        bounds = [first, *(s for s in whole.starts.tolist() if first < s < end), end]
        for begin, stop in pairwise(bounds):
            for at in range(begin, stop, COPIED_TOKENS):
                writer.write(whole.tokens[at : min(at + COPIED_TOKENS, stop)])
            writer.end_document()
        writer.close()
    for suffix in (".bin", ".idx"):
        (folder / f"rest{suffix}").replace(folder / f"train{suffix}")
    return {name: open_tokens(folder / f"{name}.bin") for name in ("train", "validation")}


def _check_inputs(inputs: Sequence[Path], folder: Path) -> None:
    for path in inputs:
        if path.is_dir():
            raise InputError("is a folder", place=str(path), remedy=f"name its files: {path}/*")
        if not path.is_file():
            raise InputError("no such file", place=str(path), remedy="give text or JSONL files")
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", place=str(folder), remedy="name a folder by -o")
    if (folder / "tokens.json").exists():
        raise InputError("holds tokens already", place=str(folder), remedy="name another folder by -o, or remove it")
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    needed = sum(path.stat().st_size for path in inputs) // 2  # two bytes of file for four of text, about
    if needed > free:
        raise InputError(
            f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
            place=str(folder),
            remedy="name a folder on a larger disk by -o",
        )
