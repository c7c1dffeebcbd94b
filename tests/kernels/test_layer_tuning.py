"""The tuning of norms and rotary positions: candidates compute what they should, and the fastest is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardplan.kernels import layer_tiles, layer_tuning
from shardplan.kernels.benchmark_timing import Timing
from shardplan.kernels.interpreter import INTERPRETED
from shardplan.kernels.layer_tuning import CANDIDATES, CURRENT, KERNELS, fastest, problem_of, with_constants


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DEVICE": "cpu", "ROWS": 80, "WIDTH": 128, "SEQ": 32, "PARTS": 40, "BF16_ERROR": 0.02}.items():
        monkeypatch.setattr(layer_tuning, name, value)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_are_right(kernel: str) -> None:
    for tiles in {CANDIDATES[kernel][0], CANDIDATES[kernel][-1], tuple(CURRENT[kernel])}:
        assert problem_of(kernel, tiles) == ""


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.usefixtures("_small")
def test_a_wrong_candidate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_tuning.norm_launch, "sum_parts", lambda parts, total, *_: total.zero_())
    assert problem_of(KERNELS[2], CANDIDATES[KERNELS[2]][0]) == "result 0 is off by 1"


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_fastest_is_written_into_the_constants(kernel: str) -> None:
    current, other = tuple(CURRENT[kernel]), next(one for one in CANDIDATES[kernel] if one != CURRENT[kernel])

    def found(seconds: float) -> dict[str, tuple[Timing | str, int]]:
        times = {str(current): 1.0, str(other): seconds, "copy": 0.1}
        return {name: (Timing(p20_s=one, p50_s=one, p80_s=one), 1) for name, one in times.items()}

    assert fastest(kernel, found(0.999)) is None
    assert fastest(kernel, found(0.9)) == other
    source = Path(layer_tiles.__file__).read_text()
    names: dict[str, object] = {"__name__": "written"}
    exec(compile(with_constants(source, kernel, other), "layer_tiles", "exec"), names)
    assert tuple(names[layer_tuning.NAMES[kernel]]) == other  # type: ignore[arg-type]
