"""Token files: nanoGPT's plain .bin and Megatron's pair, bit for bit, and what damaged ones say."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from shardplan.executor import token_files
from shardplan.executor.token_files import TokenWriter, check_vocabulary, open_tokens
from shardplan.hw_profiles.errors import InputError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0]]
FLAT = [token for document in DOCUMENTS for token in document]


def write_pair(folder, *, vocabulary=100, documents=DOCUMENTS):
    writer = TokenWriter(folder / "train.bin", vocabulary=vocabulary)
    for document in documents:
        writer.write(document)
        writer.end_document()
    writer.close()
    return folder / "train.bin"


def megatron_index(lengths, documents, *, code=8, itemsize=2, version=1) -> bytes:
    """An index as Megatron's `_IndexWriter` packs it, written out by hand."""
    begins = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
    body = struct.pack(f"<{len(lengths)}i{len(begins)}q{len(documents)}q", *lengths, *begins, *documents)
    return head + body


def refusal(path, **words) -> str:
    with pytest.raises(InputError) as refused:
        check_vocabulary(open_tokens(path, **words), 100)
    told = str(refused.value)
    assert "\n" not in told
    return told


def test_a_plain_file_is_its_tokens_and_documents_end_with_their_token(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack(f"<{len(FLAT)}H", *FLAT))
    found = open_tokens(path, end_of_document=0)
    assert found.tokens.tolist() == FLAT
    assert found.starts.tolist() == [0, 4, 6, 11]
    assert open_tokens(path).starts.tolist() == [0, 11]


def test_a_wide_plain_file(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<3I", 70_000, 1, 2**31))
    assert open_tokens(path, dtype="uint32").tokens.tolist() == [70_000, 1, 2**31]


@pytest.mark.parametrize(("vocabulary", "code", "letter", "size"), [(65_536, 8, "H", 2), (65_537, 4, "i", 4)])
def test_the_pair_is_megatrons_byte_for_byte(tmp_path, vocabulary, code, letter, size):
    path = write_pair(tmp_path, vocabulary=vocabulary)
    assert path.read_bytes() == struct.pack(f"<{len(FLAT)}{letter}", *FLAT)
    expected = megatron_index([4, 2, 5], [0, 1, 2, 3], code=code, itemsize=size)
    assert path.with_suffix(".idx").read_bytes() == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.bin", "train.idx"]


@pytest.mark.parametrize("name", ["train", "train.bin", "train.idx"])
def test_a_pair_is_read_by_any_of_its_names(tmp_path, name):
    write_pair(tmp_path)
    found = open_tokens(tmp_path / name)
    assert (found.tokens.tolist(), found.starts.tolist(), found.documents) == (FLAT, [0, 4, 6, 11], 3)


def test_a_document_of_several_sequences(tmp_path):
    """Megatron may write a sentence a sequence; documents are what counts."""
    path = write_pair(tmp_path)
    path.with_suffix(".idx").write_bytes(megatron_index([3, 1, 2, 5], [0, 2, 4]))
    assert open_tokens(path).starts.tolist() == [0, 4, 11]


def test_a_long_document_is_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MOST_SEQUENCE_TOKENS", 3)
    path = write_pair(tmp_path)
    assert open_tokens(path).starts.tolist() == [0, 4, 6, 11]
    assert path.with_suffix(".idx").read_bytes() == megatron_index([3, 1, 2, 3, 2], [0, 2, 3, 5])


def test_missing_empty_and_truncated_plain_files(tmp_path):
    path = tmp_path / "train.bin"
    assert refusal(path).startswith(f"{path}: no such token file; make it with `shardplan tokenize`")
    path.write_bytes(b"")
    assert refusal(path) == f"{path}: is empty; tokenise the text again"
    path.write_bytes(b"\x01\x00\x02")
    assert "3 bytes are no whole number of uint16 tokens: truncated" in refusal(path)
    assert "no such token file" in refusal(tmp_path / "other")
    assert "no such file" in refusal(tmp_path / "other.idx")


def test_a_wrong_width_is_noticed(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(1, 50, dtype="<u4").tofile(path)
    assert 'as in a uint32 file read as uint16; set dtype = "uint32"' in refusal(path)
    np.arange(1, 51, dtype="<u2").tofile(path)
    assert "token 131073 at position 0 is not below the model's vocabulary of 100" in refusal(path, dtype="uint32")
    assert "dtype='int8' is unknown; use uint16 or uint32" in refusal(path, dtype="int8")


def wide_ids(vocabulary: int, count: int = 4096):
    """Ids as text has them: small ones more often than large ones."""
    return (np.random.default_rng(3).random(count) ** 3 * vocabulary).astype(np.int64)


@pytest.mark.parametrize(
    ("stored", "read", "vocabulary", "told"),
    [
        ("<u4", "uint16", 128_256, 'is at most 1, as in a uint32 file read as uint16; set dtype = "uint32"'),
        ("<u4", "uint16", 50_257, 'is 0, as in a uint32 file read as uint16; set dtype = "uint32"'),
        ("<i8", "uint16", 128_256, "as in a uint64 file read as uint16; write its tokens as uint16 or uint32"),
        ("<i8", "uint32", 128_256, "is 0, as in a uint64 file read as uint32; write its tokens as uint16 or uint32"),
    ],
)
def test_halves_of_wider_tokens_are_noticed(tmp_path, stored, read, vocabulary, told):
    path = tmp_path / "train.bin"
    wide_ids(vocabulary).astype(stored).tofile(path)
    with pytest.raises(InputError) as refused:
        check_vocabulary(open_tokens(path, dtype=read), vocabulary)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("stored", "ids"),
    [
        ("uint16", wide_ids(50_257)),
        ("uint32", wide_ids(128_256)),
        ("uint32", wide_ids(300)),
        ("uint16", np.tile([5, 0], 500)),  # a toy of few tokens
        ("uint16", np.tile([7, 1, 9, 0], 500)),
        ("uint16", np.zeros(500)),
        ("uint16", np.arange(100, 110).repeat(2) * np.tile([1, 0], 10)),  # too short to tell
    ],
    ids=["uint16", "uint32", "bytes", "pair", "four", "zeros", "short"],
)
def test_files_of_the_right_width_are_taken(tmp_path, stored, ids):
    path = tmp_path / "train.bin"
    ids.astype(stored).tofile(path)
    check_vocabulary(open_tokens(path, dtype=stored), 128_256)


def test_foreign_headers_are_named(tmp_path):
    path = tmp_path / "train.bin"
    np.array([20240520, 1, *[0] * 254], dtype="<i4").tofile(path)
    assert "begins with llm.c's header" in refusal(path)
    with path.open("wb") as file:
        np.save(file, np.arange(9, dtype=np.uint16))
    assert "begins with a NumPy header" in refusal(path)


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK_TOKENS", 4)
    path = write_pair(tmp_path, documents=[[1, 2, 3, 4, 5, 6, 99, 100, 7]])
    assert "token 100 at position 7 is not below the model's vocabulary of 100; tokenise with" in refusal(path)


def test_of_a_large_file_blocks_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(token_files, "SCANNED_TOKENS", 8)
    found = open_tokens(write_pair(tmp_path, documents=[[1] * 50 + [100, 1]]))
    with pytest.raises(InputError, match="token 100 at position 50"):
        check_vocabulary(found, 100)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda index: b"other" + index[5:], "is not an index of Megatron's indexed dataset"),
        (lambda index: index[:20], "20 bytes are less than a header: truncated"),
        (lambda index: index[:-1], "93 bytes where 3 sequences and 4 document indices take 102: truncated"),
        (lambda index: megatron_index([4, 2, 5], [0, 1, 2, 3], version=2), "version 2 is not 1"),
        (lambda index: megatron_index([4, 2, 5], [0, 1, 2, 3], code=6), "width code 6"),
        (lambda index: megatron_index([4, 2, 5], [0, 1, 2]), "document indices do not ascend from 0 to the end"),
        (lambda index: megatron_index([4, 2, 5], [0, 1, 2, 3], itemsize=4), "sequence 1 does not begin where"),
        (
            lambda index: megatron_index([4, 2, 6], [0, 1, 2, 3]),
            "22 bytes where train.idx says 24 (12 tokens of uint16)",
        ),
    ],
)
def test_damaged_pairs_are_refused(tmp_path, damage, told):
    path = write_pair(tmp_path)
    index = path.with_suffix(".idx")
    index.write_bytes(damage(index.read_bytes()))
    assert told.replace("93 bytes", f"{index.stat().st_size} bytes") in refusal(path)


def test_an_abandoned_file_leaves_nothing(tmp_path):
    writer = TokenWriter(tmp_path / "train.bin", vocabulary=100)
    writer.write([1, 2])
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
