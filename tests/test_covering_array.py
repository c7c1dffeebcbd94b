"""Every two values of two layout words, in all kinds of models: refused by a named rule, or equal to one process.

The combinations are built from what the runtime `shardplan` says it can do, so a new ability is covered by a value in `factors`. The file
is also the script of a rank (combinations in a file), and by hand the launcher of 16 ranks: python tests/test_covering_array.py smoke
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout, parse_layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.rule import Setting
from shardplan.costmodel.rules import rejections
from shardplan.costmodel.runtime import load_runtime
from shardplan.executor.check import torch_refusals
from shardplan.hw_profiles.load import load_cluster

LAYERS = 5
"""Of the models: uneven over 2 and 4 chunks, too few for 8."""
STEPS = 2
"""The second loss sees the first update."""
LEAST_MARGIN = 1e-6
"""Of a router's choice: ten roundings of a score."""
BESIDE = {
    4: [
        ("llama-deep", 8, "pp=4 schedule=dualpipe_v virtual_stages=2"),
        ("llama-deep", 4, "pp=4 schedule=zero_bubble_v virtual_stages=2"),
        ("llama-deep", 4, "pp=4 schedule=interleaved virtual_stages=2 recompute=full:1"),
    ]
}
"""By ranks: what LAYERS are too few for."""
SMOKE = ("dp=4 dp_shard=2 tp=2 pp=2 zero=2", "dp=2 tp=2 pp=2 cp=2 zero=1")
"""Four axes of the mesh each, 16 ranks."""


def sibling(name: str) -> ModuleType:
    """Another file of this folder as a module, however this one was started."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "__covering__"):
        spec.loader.exec_module(module)
        module.__covering__ = True
    return module


@cache
def models() -> dict[str, Model]:
    """Those of the parity test with other depths, and Llama with its embedding tied."""
    known = sibling("test_executor_parity").models()
    deeper = {name: _of_depth(model) for name, model in known.items()}
    tied = replace(deeper["llama"], name="llama-tied", tied_embeddings=True)
    deep = replace(known["llama"], name="llama-deep", layers=((known["llama"].layers[0][0], 8),))
    return {**deeper, tied.name: tied, deep.name: deep}


def _of_depth(model: Model) -> Model:
    (kind, _), *others = model.layers
    rest = sum(count for _, count in others)
    return replace(model, layers=((kind, LAYERS - rest), *others))


def factors(ranks: int) -> dict[str, list[str]]:
    """Words of a combination and what each can be; the first value goes with most others."""
    can = load_runtime("shardplan").abilities
    names = [
        name
        for name, one in models().items()
        if one.layer_count == LAYERS and (can.experts or not any(kind.experts for kind, _ in one.layers))
    ]
    chunked = [
        f"schedule={word} virtual_stages=2" for word in can.schedules if word not in ("gpipe", "1f1b", "zero_bubble")
    ]
    whole = [f"schedule={word}" for word in can.schedules if word in ("gpipe", "1f1b", "zero_bubble")]
    parts = ["selective:layernorm+qkv", "selective:mlp"] if can.recompute_parts else []
    return {
        "mesh": meshes(ranks, axes=("dp", "pp", *(["tp"] if can.tensor_parallel else []), *(["cp"] if can.context_parallel else []))),
        "model": names,
        "zero": [f"zero={stage}" for stage in (1, *(stage for stage in can.zero if stage != 1))],
        "shards": ["", *(["dp_shard=2"] if can.hsdp else []), *(["hpz=2"] if "hpz" in can.zeropp else [])],
        "sequence": ["", *(["sequence_parallel=true"] if can.sequence_parallel else [])],
        "schedule": ["", *whole, *chunked],
        "stages": ["", "uneven"],
        "recompute": ["", *(f"recompute={word}" for word in (*can.recompute, "full:1", "full:2,1", *parts) if word != "none")],
        "micro_batch": ["micro_batch=1", "micro_batch=2"],
        "accumulate": ["4", "1", "2"],
        "order": ["", *(f"order={word}" for word in ("dp-tp-cp-pp", "pp-cp-tp-dp") if word in can.orders)],
        "cp_kind": ["", *(f"cp_kind={word}" for word in can.context_parallel if word != "ring")],
        "ep": ["", *(["ep=2"] if can.expert_parallel else [])],
    }  # fmt: skip


def meshes(ranks: int, *, axes: tuple[str, ...]) -> list[str]:
    """Every way to write `ranks` as a product over `axes`, as layout words."""
    if not axes:
        return [""] if ranks == 1 else []
    here = [size for size in range(1, ranks + 1) if ranks % size == 0]
    found = [
        f"{axes[0]}={size} {rest}" if size > 1 else rest
        for size in reversed(here)
        for rest in meshes(ranks // size, axes=axes[1:])
    ]
    return [words.strip() for words in found]


def means_nothing(chosen: dict[str, str]) -> bool:
    """A pipeline has a schedule, nothing else has one."""
    if "mesh" not in chosen or "schedule" not in chosen:
        return False
    return ("pp=" in chosen["mesh"]) != bool(chosen["schedule"])


def case_of(chosen: dict[str, str]) -> tuple[str, int, str]:
    """(model, global batch, layout words) of a combination, as the parity test has them."""
    apart = ("model", "stages", "accumulate")
    words = " ".join(value for name, value in chosen.items() if value and name not in apart)
    layout = parse_layout(words)
    if chosen["stages"]:
        words = f"{words} stage_layers={','.join(map(str, uneven(layout)))}"
    return chosen["model"], layout.dp * layout.micro_batch * int(chosen["accumulate"]), words


def uneven(layout: Layout) -> list[int]:
    """One layer in each chunk, the rest in the last two: what no default does."""
    chunks = layout.pp * layout.virtual_stages
    split = [1] * chunks
    for extra in range(max(LAYERS - chunks, 0)):
        split[-1 - extra % min(2, chunks)] += 1
    return split


@cache
def setting(model: str, global_batch: int, gpus: int) -> Setting:
    seq = sibling("test_executor_parity").SEQ
    return Setting(
        model=models()[model],
        job=Job(seq=seq, global_batch=global_batch, precision="fp32"),
        cluster=load_cluster("h100-ib", gpus=gpus),
        runtime=_runtime(),
    )


@cache
def _runtime():
    return load_runtime("shardplan")


def rules(chosen: dict[str, str]) -> frozenset[str]:
    """Names of the rules that refuse a combination: the cost model's, and those of this torch on a CPU."""
    model, batch, words = case_of(chosen)
    layout = parse_layout(words)
    found, _ = rejections(setting(model, batch, layout.gpus), layout)
    found = [*found, *torch_refusals(layout, device="cpu")]
    assert all(one.rule and one.detail and one.remedy for one in found)
    return frozenset(one.rule for one in found)


@cache
def array(ranks: int):
    return sibling("covering").covering_array(factors(ranks), rules, means_nothing)


@pytest.mark.parametrize("ranks", [4])
def test_every_pair_is_run_or_refused_by_a_named_rule(ranks):
    words, found = factors(ranks), array(ranks)
    names = list(words)
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            for a in words[first]:
                for b in words[names[j]]:
                    if means_nothing({first: a, names[j]: b}):
                        continue
                    pair = (i, a, j, b)
                    assert pair in found.covered or found.impossible.get(pair), (first, a, names[j], b)
    assert not any(rules(dict(zip(names, row, strict=True))) for row in found.rows)
    assert found.refused
    assert all(found.refused.values())
    for name, values in words.items():  # no value is refused wherever it stands
        assert set(values) == {row[names.index(name)] for row in found.rows}, name


def test_the_same_words_give_the_same_combinations():
    few = {name: values[:2] for name, values in factors(4).items()}
    first, second = (sibling("covering").covering_array(few, rules, means_nothing).rows for _ in range(2))
    assert first == second


def cases(ranks: int) -> list[tuple[str, int, str]]:
    """What is run: the array, and what stands beside it where this torch can."""
    rows = [case_of(dict(zip(factors(ranks), row, strict=True))) for row in array(ranks).rows]
    able = [one for one in BESIDE.get(ranks, []) if not any(torch_refusals(parse_layout(one[2]), device="cpu"))]
    return [*rows, *able]


def launch(ranks: int, chosen: list[tuple[str, int, str]], folder: Path, *, timeout_s: int) -> dict[str, dict]:
    """Run the combinations in one job; the answers by combination."""
    todo, result = folder / "cases.json", folder / "result.json"
    todo.write_text(json.dumps(chosen))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*torchrun, __file__, str(todo), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-60_000:]
    return json.loads(result.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_what_no_rule_refuses_computes_what_one_process_computes(ranks, tmp_path):
    pytest.importorskip("torch", reason="the executor needs torch")
    found = launch(ranks, cases(ranks), tmp_path, timeout_s=2400)
    assert len(found) == len(set(cases(ranks)))
    assert wrong(found) == {}


def wrong(found: dict[str, dict]) -> dict[str, dict]:
    """Combinations beyond the tolerances of the parity test."""
    parity = sibling("test_executor_parity")
    return {
        key: one
        for key, one in found.items()
        if not (
            one["loss"] < parity.LOSS_TOLERANCE
            and one["gradient"] < parity.GRADIENT_TOLERANCE
            and one["norm"] < parity.GRADIENT_TOLERANCE
            and one["margin"] > LEAST_MARGIN
            and one["names"] == one["expected_names"]
        )
    }


# --- what a rank does ---------------------------------------------------------------------------------------------


def rank_main(todo: Path, result: Path) -> None:
    import torch
    import torch.distributed as dist

    parity, process_group = sibling("test_executor_parity"), sibling("ranks").process_group
    parity.STEPS = STEPS
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    expected = cache(lambda name, batch, micro_batch: parity.reference(models()[name], batch, micro_batch))
    answers = {}
    for number, (name, batch, words) in enumerate(json.loads(todo.read_text())):
        if rank == 0:
            print(f"running {name} {batch} {words}", file=sys.stderr, flush=True)
        right = expected(name, batch, parse_layout(words).micro_batch)
        every: list[dict] = [{}] * world
        with process_group(f"case-{number}"):
            dist.all_gather_object(every, parity.difference(models()[name], words, batch, right))
        answers[parity.case_key(name, batch, words)] = {
            **{field: max(one[field] for one in every) for field in ("loss", "gradient", "norm", "margin")},
            "names": sorted(set().union(*(one["names"] for one in every))),
            "expected_names": sorted(right[1]),
        }
    if rank == 0:
        result.write_text(json.dumps(answers))
    os._exit(0)  # as shardplan.executor.train does, for the reason told there


def smoke(folder: Path) -> None:
    """Four axes on 16 ranks of this machine, each layout that the runtime can run; takes minutes."""
    chosen = [("gpt-tied", parse_layout(words).dp * 2, words) for words in SMOKE]
    able = [case for case in chosen if not rejections(setting(*case[:2], 16), parse_layout(case[2]))[0]]
    found = launch(16, able, folder, timeout_s=1800)
    for key, one in found.items():
        print(f"{key}: loss {one['loss']:.1e} gradient {one['gradient']:.1e} norm {one['norm']:.1e}")
    if wrong(found):
        sys.exit("not equal to one process")


if __name__ == "__main__":
    if sys.argv[1:2] == ["smoke"]:
        import tempfile

        with tempfile.TemporaryDirectory() as made:
            smoke(Path(made))
    else:
        rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
