"""`shardplan tokenize`: what goes in comes out again, with a trained tokenizer and with a given one."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from shardplan.executor import text_tokens
from shardplan.executor.text_tokens import end_of_document, load_tokenizer, tokenize_files, train_tokenizer
from shardplan.executor.token_files import open_tokens
from shardplan.hw_profiles.errors import InputError

pytest.importorskip("tokenizers", reason="tokenize needs the tokenizers library")

PARAGRAPH = "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void;\n\n"
TEXTS = [PARAGRAPH * 3, "Grüße, 世界! 🙂\r\n\ttabs  and   spaces\n", "naïve café\n" * 5]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(TEXTS)))
    return path


def documents_of(folder, name="train.bin") -> list[list[int]]:
    found = open_tokens(folder / name)
    return [part.tolist() for part in np.split(found.tokens, found.starts[1:-1])]


def decoded(folder, name="train.bin") -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    end = json.loads((folder / "tokens.json").read_text())["end_of_document"]
    found = documents_of(folder, name)
    assert all(ids[-1] == end and end not in ids[:-1] for ids in found)
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in found]


def shardplan_tokenize(*words):
    """Exit code, stdout, stderr of `shardplan tokenize`, in this process."""
    from shardplan.cli.text_tokens import tokenize

    app = typer.Typer()
    app.command()(tokenize)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_trained_tokenizer_gives_every_text_back(lines, tmp_path):
    result = shardplan_tokenize(lines, "-o", tmp_path / "out", "--vocab", "300", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert decoded(tmp_path / "out") == TEXTS
    found = open_tokens(tmp_path / "out" / "train.bin")
    assert (made["tokens"], made["documents"], made["dtype"]) == (len(found.tokens), 3, "uint16")
    assert 257 < made["vocabulary"] <= 300
    assert found.tokens.max() < made["vocabulary"]
    assert made["files"] == {"train.bin": {"tokens": made["tokens"], "documents": 3}}
    assert json.loads((tmp_path / "out" / "tokens.json").read_text()) == {
        key: value for key, value in made.items() if key != "folder"
    }


def test_a_given_tokenizer_is_used_as_it_is(lines, tmp_path):
    given = train_tokenizer([lines], 280)
    given.save(str(tmp_path / "given.json"))
    result = shardplan_tokenize(lines, "-o", tmp_path / "out", "--tokenizer", tmp_path / "given.json")
    assert result.exit_code == 0, result.output
    assert decoded(tmp_path / "out") == TEXTS
    end = given.token_to_id("<|endoftext|>")
    assert documents_of(tmp_path / "out") == [[*given.encode(text).ids, end] for text in TEXTS]
    assert "3 documents, vocabulary 280" in result.stdout


def test_a_given_tokenizer_adds_nothing_around_a_document(lines, tmp_path):
    from tokenizers import processors

    given = train_tokenizer([lines], 280)
    given.add_special_tokens(["<s>"])
    given.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 280)])
    given.save(str(tmp_path / "given.json"))
    made = tokenize_files([lines], tmp_path / "out", tokenizer=tmp_path / "given.json")
    assert decoded(tmp_path / "out") == TEXTS
    assert made.vocabulary == 281


def test_a_vocabulary_below_the_bytes_holds_the_bytes_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(PARAGRAPH * 20)
    made = tokenize_files([tmp_path / "a.txt"], tmp_path / "out", vocabulary=64)
    assert made.vocabulary <= 64
    assert decoded(tmp_path / "out") == [PARAGRAPH * 20]
    with pytest.raises(InputError, match=r"--vocab 16 has no room for the \d+ bytes and special tokens"):
        tokenize_files([tmp_path / "a.txt"], tmp_path / "small", vocabulary=16)


def test_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    text = PARAGRAPH * 50 + "a line\nanother, with a stop.\nand more\r\n" * 30 + "no breaks " * 300
    (tmp_path / "a.txt").write_text(text, newline="")
    given = train_tokenizer([tmp_path / "a.txt"], 300)
    given.save(str(tmp_path / "given.json"))
    monkeypatch.setattr(text_tokens, "PIECE_CHARACTERS", 64)
    pieces = list(text_tokens.pieces([tmp_path / "a.txt"], "text"))
    assert len(pieces) > 50
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    tokenize_files([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "given.json")
    assert documents_of(tmp_path / "out") == [[*given.encode(text).ids, 0]]


@pytest.mark.parametrize(("text", "longest"), [("a line of words\n", 2), ("no breaks ", 5), ("x", 17)])
def test_pieces_of_a_long_document_stay_small(tmp_path, text, longest):
    """Else memory grows with the input: what is held must shrink as fast as it is read."""
    (tmp_path / "a.txt").write_text(text * 100_000)
    found = [piece for piece, _ in text_tokens.pieces([tmp_path / "a.txt"], "text", 1000)]
    assert "".join(found) == text * 100_000
    assert max(len(piece) for piece in found) <= longest * 1000


def test_the_end_of_document_token_in_the_text_ends_documents(tmp_path):
    (tmp_path / "stories.txt").write_text("<|endoftext|>one<|endoftext|>\ntwo<|endoftext|>")
    tokenize_files([tmp_path / "stories.txt"], tmp_path / "out", vocabulary=300)
    assert decoded(tmp_path / "out") == ["one", "\ntwo"]


def test_compressed_text_and_several_inputs(lines, tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8", newline="") as file:
        file.write(TEXTS[1])
    tokenize_files([tmp_path / "a.txt.gz", lines], tmp_path / "out", vocabulary=300)
    assert decoded(tmp_path / "out") == [TEXTS[1], *TEXTS]


def test_the_last_documents_are_held_out(tmp_path):
    texts = [f"document {i} of the text" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    words = ("--text-field", "body", "--vocab", "300", "--validation", "0.1", "--json")
    made = json.loads(shardplan_tokenize(tmp_path / "a.jsonl", "-o", tmp_path / "out", *words).stdout)
    assert made["files"]["validation.bin"]["documents"] == pytest.approx(10, abs=1)
    assert decoded(tmp_path / "out") + decoded(tmp_path / "out", "validation.bin") == texts
    assert sum(one["tokens"] for one in made["files"].values()) == made["tokens"]
    names = ["tokenizer.json", "tokens.json", "train.bin", "train.idx", "validation.bin", "validation.idx"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text(PARAGRAPH * 50)
    made = tokenize_files([tmp_path / "a.txt"], tmp_path / "out", vocabulary=300, validation_fraction=0.2)
    assert made.files["validation.bin"]["tokens"] == pytest.approx(0.2 * made.tokens, abs=1)


def test_a_large_vocabulary_is_written_wide(lines, tmp_path):
    given = train_tokenizer([lines], 280)
    given.add_tokens([f"<{i}>" for i in range(66_000)])
    given.save(str(tmp_path / "given.json"))
    assert tokenize_files([lines], tmp_path / "out", tokenizer=tmp_path / "given.json").dtype == "int32"
    assert decoded(tmp_path / "out") == TEXTS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: has no field 'text'; name its field by --text-field; did"),
        ('{"text": "a"}\n{"text": \n', "a.jsonl, line 2: is not JSON"),
        ("[1]\n", "a.jsonl, line 1: is no JSON object"),
        ('{"text": 3}\n', "a.jsonl, line 1: field 'text' is no text"),
        ("", "a.jsonl: holds no text; give files with text"),
    ],
)
def test_damaged_lines_are_named(tmp_path, content, told):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        tokenize_files([path], tmp_path / "out", vocabulary=300)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "tokens.json").exists()


def test_what_cannot_be_read_or_written_is_refused(lines, tmp_path):
    def refusal(*inputs, folder=tmp_path / "out", **words) -> str:
        with pytest.raises(InputError) as refused:
            tokenize_files(list(inputs), folder, vocabulary=300, **words)
        return str(refused.value)

    assert "no such file" in refusal(tmp_path / "missing.txt")
    assert "is a folder; name its files" in refusal(tmp_path)
    assert "is a file; name a folder by -o" in refusal(lines, folder=lines)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "latin.txt: is not UTF-8" in refusal(tmp_path / "latin.txt")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    assert "a.txt.gz: cannot be read" in refusal(tmp_path / "a.txt.gz")
    assert "is not a tokenizer" in refusal(lines, tokenizer=lines)
    assert "has no token '</s>'" in refusal(lines, end="</s>")
    tokenize_files([lines], tmp_path / "made", vocabulary=300)
    assert "holds tokens already; name another folder" in refusal(lines, folder=tmp_path / "made")


@pytest.mark.parametrize("content", ["", "\n"], ids=["empty", "blank line"])
def test_nothing_is_made_of_no_text(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no text"):
        tokenize_files([tmp_path / "a.jsonl"], tmp_path / "made", vocabulary=300)
    assert not (tmp_path / "made").exists()


def test_the_usual_end_tokens_are_found():
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.BPE())
    with pytest.raises(InputError, match="has none of the usual end-of-document tokens; name one of its tokens"):
        end_of_document(bare, None, place="x")
    bare.add_special_tokens(["<s>", "</s>"])
    assert end_of_document(bare, None, place="x") == 1
    assert end_of_document(bare, "<s>", place="x") == 0
