"""The static gate lets good kernels through and names what is wrong with the others, in one line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shardplan.kernels.gate_compile import Compiled
from shardplan.kernels.gate_rules import faults
from shardplan.kernels.shipped import Shipped
from shardplan.kernels.static_gate import shipping_modules

SAMPLES = """
import triton
import triton.language as tl

from shardplan.kernels.shipped import Shipped


@triton.jit
def products(tiles, out, COUNT, ROWS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr = 1.0):
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for step in tl.range(COUNT):
        x = tiles.load([0, 0, step * ROWS, 0]).reshape(ROWS, WIDTH)
        total += tl.dot(x, tl.trans(x))
    row = tl.arange(0, ROWS)
    tl.store(out + row[:, None] * ROWS + row[None, :], total * SCALE)


@triton.jit
def doubled(x, y, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < COUNT), mask=at < COUNT)


def tile(name, rows, width, warps, stages, **more):
    types = {"tiles": f"tensordesc<bf16[1, 1, {rows}, {width}]>", "out": "*fp32", "COUNT": "i32"}
    return Shipped(
        name=name, kernel=products, signature=types, constants={"ROWS": rows, "WIDTH": width},
        warps=warps, stages=stages, tensor_cores=True, **more,
    )


def line(name, **more):
    types = {"x": "*bf16", "y": "*bf16", "COUNT": "i32"}
    return Shipped(name=name, kernel=doubled, signature=types, constants={"BLOCK": 1024}, warps=4, stages=1, **more)
"""
GOOD = 'tile("good tile", 128, 64, 8, 3, tma=True, capabilities=(80, 90, 100)), line("good line")'
REFUSED = {
    'tile("spills", 256, 64, 4, 2)': "bytes of stack a thread, limit 0; use smaller tiles or more warps",
    'tile("too large", 128, 256, 8, 4, tma=True)': "bytes of shared memory, limit 232,448; use fewer stages",
    'line("no product", tensor_cores=True)': "no product (sm_90): 0 HGMMA instructions",
    'line("no descriptor", tma=True)': "no descriptor (sm_90): 0 UTMALDG instructions, at least 1 claimed",
    'line("no loaders", specialised=True)': "no loaders (sm_90): 128 threads in 4 warps, more claimed",
    'tile("odd", 96, 64, 4, 2)': "odd (sm_90): does not compile: ",
}


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str
    rows: list[dict]


@pytest.fixture
def gate(tmp_path: Path, child_environment: dict[str, str]):
    """Run the gate on the samples in a process that compiles."""

    def run(entries: str, environment: dict[str, str] | None = None) -> Answer:
        (tmp_path / "samples.py").write_text(f"{SAMPLES}\n\ndef shipped():\n    return [{entries}]\n")
        plain = {name: value for name, value in child_environment.items() if name != "TRITON_INTERPRET"}
        plain["PYTHONPATH"] += os.pathsep + str(tmp_path)
        answer = tmp_path / "gate.json"
        words = ["--module", "samples", "--cache", str(tmp_path / "cache"), "--json", str(answer)]
        done = subprocess.run(
            [sys.executable, "-m", "shardplan.kernels.static_gate", *words],
            env=plain | (environment or {}), capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        return Answer(
            done.returncode, done.stdout, done.stderr, json.loads(answer.read_text()) if answer.exists() else []
        )

    return run


def test_good_kernels_pass_and_are_compiled_once(gate) -> None:
    answer = gate(GOOD)
    assert answer.code == 0, answer.err
    assert "4 kernels, 4 compiled now, 0 faults" in answer.out
    rows = {(row["kernel"], row["arch"]): row for row in answer.rows}
    hopper = rows["good tile", 90]
    assert hopper["hgmma"] > 0
    assert hopper["utmaldg"] > 0, "a host descriptor is loaded by TMA"
    assert hopper["stack_bytes"] == hopper["local_loads"] == 0
    assert rows["good tile", 80]["mma"] > 0
    assert rows["good tile", 100]["hgmma"] > 0
    assert rows["good line", 90]["hgmma"] == 0
    assert "4 kernels, 0 compiled now, 0 faults" in gate(GOOD).out


def test_each_bad_kernel_is_refused_in_one_line(gate) -> None:
    answer = gate(", ".join(REFUSED))
    assert answer.code == 1
    lines = answer.err.splitlines()
    assert all(line.startswith("refused: ") for line in lines)
    for entry, reason in REFUSED.items():
        name = entry.split('"')[1]
        assert [line for line in lines if f"refused: {name} (sm_90)" in line and reason in line], (name, lines)


def test_it_does_not_run_in_the_interpreter(gate) -> None:
    answer = gate(GOOD, {"TRITON_INTERPRET": "1"})
    assert answer.code == 2
    assert "unset it" in answer.err


def test_names_are_unique(gate) -> None:
    answer = gate('line("same"), line("same")')
    assert answer.code == 2
    assert "used twice: same" in answer.err


ENTRY = Shipped(name="k", kernel=None, signature={}, constants={}, warps=8, stages=2)
WELL = Compiled(registers=200, threads=256, shared_bytes=1000, hgmma=1)


@pytest.mark.parametrize(
    ("arch", "change", "said"),
    [
        (90, {"registers": 168, "threads": 384}, ""),
        (90, {"registers": 255}, ""),
        (90, {"registers": 169, "threads": 384}, "176 registers x 384 threads = 67,584, limit 65,536; use fewer warps"),
        (80, {"shared_bytes": 166_913}, "166,913 bytes of shared memory, limit 166,912"),
        (90, {"shared_bytes": 232_448}, ""),
        (90, {"stack_bytes": 8}, "8 bytes of stack a thread, limit 0"),
        (80, {"stack_bytes": 8}, ""),
        (100, {"tensor_memory_columns": 1024}, "1024 columns of tensor memory, limit 512"),
    ],
)
def test_limits(arch: int, change: dict[str, int], said: str) -> None:
    found = faults(ENTRY, arch, replace(WELL, **change))
    assert [said in line for line in found] == ([True] if said else [])


def test_the_package_ships_what_it_has(root: Path) -> None:
    kernels = [path for path in (root / "kernels").glob("*.py") if "\n@triton.jit" in path.read_text()]
    assert bool(kernels) == bool(shipping_modules())
