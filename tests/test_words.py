"""Malformed layout words, job words and runtime files: each names the word, its value and the remedy."""

from __future__ import annotations

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.errors import InputError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dp=8 tpp=2", "'tpp' is unknown; did you mean etp or pp or tp?"),
        ("dp=0", "dp=0 is not a positive"),
        ("dp=-2", "dp=-2"),
        ("dp=x", "dp='x' is malformed"),
        ("dp", "'dp' is not word=value"),
        ("dp=2 dp=4", "given twice"),
        ("zero=4", "zero=4"),
        ("recompute=ful", "recompute='ful'"),
        ("recompute=full:0", "recompute='full:0'"),
        ("recompute=selective:core_atn", "part 'core_atn' is unknown; did you mean core_attn?"),
        ("recompute=selective:", "recompute='selective:'"),
        ("recompute=none:mlp", "recompute='none:mlp'"),
        ("schedule=1f2b", "did you mean 1f1b"),
        ("sequence_parallel=maybe", "true or false"),
        ("stage_layers=3,a", "10,12,12,10"),
        ("offload_optimizer=gpu", "offload_optimizer='gpu'"),
    ],
)
def test_bad_layout_words_name_the_remedy(text: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_layout(text)
    assert problem in str(caught.value)


def test_bad_job_words() -> None:
    for bad in (
        {"seq": 0},
        {"global_batch": -1},
        {"precision": "bf61"},
        {"optimizer": "adan"},
        {"grad_dtype": "int8"},
        {"tokens": 0},
    ):
        with pytest.raises(InputError) as caught:
            Job(**{"seq": 1, "global_batch": 1, **bad})
        assert next(iter(bad)) in str(caught.value)


def test_unknown_runtime_and_bad_runtime_file(tmp_path) -> None:
    with pytest.raises(InputError, match="did you mean megatron"):
        load_runtime("megatrom")
    with pytest.raises(InputError, match="no such runtime file"):
        load_runtime("nowhere.toml")
    text = (
        __import__("importlib.resources").resources.files("shardplan.costmodel") / "runtimes" / "fsdp2.toml"
    ).read_text()
    broken = tmp_path / "mine.toml"
    broken.write_text(text.replace("hsdp = true", "hsdpp = true"))
    with pytest.raises(InputError, match="hsdpp"):
        load_runtime(str(broken))
    broken.write_text(text[:200])
    with pytest.raises(InputError, match=r"mine\.toml"):
        load_runtime(str(broken))
