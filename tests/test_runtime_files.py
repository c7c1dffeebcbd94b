"""What a runtime's file may say: every number and word that no runtime has is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.runtime import load_runtime
from shardplan.costmodel.runtime_document import runtime_names
from shardplan.hw_profiles.errors import InputError

HEAD = 'name = "mine"\nversion = "1"\nsource = "here"\nbase = "fsdp2"\n'


@pytest.mark.parametrize("name", runtime_names())
def test_shipped_runtimes_are_read(name: str) -> None:
    assert load_runtime(name).name == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "name is missing"),
        (HEAD.replace('source = "here"\n', ""), "source is missing"),
        (HEAD + "[communication]\nreduce_overlap = 1.5\n", "communication.reduce_overlap=1.5 is out of range"),
        (HEAD + "[communication]\nreduce_overlap = nan\n", "use a share from 0 to 1"),
        (
            HEAD + "[expert_parallel]\nproduct_rate = 0\n",
            "expert_parallel.product_rate=0 is out of range; use a number above 0",
        ),
        (HEAD + "[execution]\nattention_rate = 0\n", "execution.attention_rate=0 is out of range"),
        (HEAD + "[execution]\nstep_overhead_s = -1\n", "execution.step_overhead_s=-1 is out of range"),
        (HEAD + '[abilities]\nschedules = ["1f1bb"]\n', "abilities.schedules has the unknown '1f1bb'"),
        (HEAD + "[abilities]\nzero = [0, 7]\n", "abilities.zero has the unknown 7"),
        (
            HEAD.replace("fsdp2", "nanotron") + "[abilities]\nzero = [0, 1, 3]\n",
            "abilities.zero has 3, but states.bf16 has no zero_3; say what a rank holds under stage 3",
        ),
        (HEAD + "[communication]\nreduce_overlp = 0.5\n", "reduce_overlap"),
    ],
)
def test_what_no_runtime_has_is_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        load_runtime(str(file))
    assert told in str(refused.value)
    assert "mine.toml" in str(refused.value)


def test_adapters_named_twice_are_there_once() -> None:
    once, twice = (Job(seq=8, global_batch=1, method="lora", lora_targets=words).adapters for words in ("q", "q+q"))
    assert once == twice
