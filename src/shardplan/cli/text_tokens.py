"""`shardplan tokenize`: text and JSONL to files of tokens that `shardplan run --job` trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

InputsArgument = Annotated[
    list[Path], typer.Argument(metavar="INPUT…", help="Text or JSONL (.jsonl, .ndjson), also with .gz behind.")
]
OutOption = Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where the token files are made.")]
TokenizerOption = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json; default: train one on the inputs."),
]
VocabOption = Annotated[
    int, typer.Option("--vocab", min=16, max=2**31 - 1, help="Most tokens of the trained tokenizer.")
]
FieldOption = Annotated[str, typer.Option("--text-field", help="Field of a JSONL line that holds the text.")]
EndOption = Annotated[
    str | None,
    typer.Option("--end-of-document", metavar="TOKEN", help="Put behind each document; default: the tokenizer's own."),
]
ValidationOption = Annotated[
    float,
    typer.Option("--validation", min=0.0, max=0.5, help="Share of the tokens, at the end, kept for validation."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON and nothing else to stdout.")]


def tokenize(
    inputs: InputsArgument,
    *,
    out: OutOption,
    tokenizer: TokenizerOption = None,
    vocab: VocabOption = 32_000,
    text_field: FieldOption = "text",
    end_of_document: EndOption = None,
    validation: ValidationOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Turn text into token files, with a trained or a given tokenizer.

    Example: shardplan tokenize corpus.jsonl -o tokens --vocab 32000 --validation 0.01

    A line of JSONL is a document, and so is a text file. Exit codes: 0 made, 1 the tokenizers library is missing, 2 malformed input.
    """
    import json
    import sys
    from dataclasses import asdict
    from importlib.util import find_spec

    from shardplan.executor.text_tokens import tokenize_files

    if find_spec("tokenizers") is None:
        print("shardplan: this needs tokenizers; install shardplan[run]", file=sys.stderr)
        raise typer.Exit(1)

    def tell(phase: str, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{count:,} {phase}", end="", file=sys.stderr, flush=True)

    made = tokenize_files(
        inputs,
        out,
        tokenizer=tokenizer,
        vocabulary=vocab,
        text_field=text_field,
        end=end_of_document,
        validation_fraction=validation,
        tell=tell,
    )
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), **asdict(made)}, indent=1))
        return
    typer.echo(f"{out}: {made.tokens:,} tokens in {made.documents:,} documents, vocabulary {made.vocabulary:,}")
    for name, counts in made.files.items():
        typer.echo(f"  {name}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, {made.dtype}")
