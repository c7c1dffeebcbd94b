"""Files of `shardplan bench kernels` as curves of attention kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardplan.executor.calibrate_profile import check_device, put_kernels
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.kernel_curves import attention_tables, read_kernel_rates
from shardplan.hw_profiles.load import cluster_document, cluster_from_document
from shardplan.hw_profiles.machine import AttentionCurve

HEAD = "kernel,case,provider,metric,unit,p20,p50,p80,device,torch,triton,driver,date,note\n"
TAIL = "NVIDIA H200,2.11.0,3.6.0,580,2026-11-26T03:39:15+00:00,"
PEAK = 1e15
TRUE = AttentionCurve(
    head_dims=(64.0, 128.0),
    forward=(0.4, 0.6),
    backward=(0.3, 0.5),
    forward_ramp_tokens=80.0,
    backward_ramp_tokens=240.0,
    causal_ramp_tokens=400.0,
)


def written(tmp_path: Path, lengths: tuple[int, ...], masks: tuple[str, ...] = ("causal", "full")) -> Path:
    lines = ["device,bf16 product of 8192: G,matmul,rate,TFLOP/s,1,2,3," + TAIL]
    for way in ("forward", "backward"):
        for width, mask, seq in ((w, m, s) for w in (64, 128) for m in masks for s in lengths):
            rate = float(TRUE.at(way, width, seq, causal=mask == "causal")) * PEAK / 1e12  # type: ignore[arg-type]
            lines.append(f"attention {way},D{width} {mask} S{seq},shardplan,rate,TFLOP/s,0,{rate},0,{TAIL}")
            lines.append(f"attention {way},D{width} {mask} S{seq},shardplan,time,us,0,1,0,{TAIL}")
    lines.append(f"attention forward,D64 full S4096,sdpa flash,rate,TFLOP/s,0,300,0,{TAIL}")
    path = tmp_path / "kernels.csv"
    path.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_ramps_and_plateaus_are_found_again(tmp_path: Path) -> None:
    found = read_kernel_rates(written(tmp_path, (512, 1024, 4096, 16384)))
    assert found.device == "NVIDIA H200"
    tables = attention_tables(found, PEAK)
    assert list(tables) == ["shardplan"], "a kernel with one pass has no curve"
    table = tables["shardplan"]
    assert table["head_dim"] == [64.0, 128.0]
    assert table["forward"] == pytest.approx([0.4, 0.6], rel=1e-3)
    assert table["backward"] == pytest.approx([0.3, 0.5], rel=1e-3)
    ramps = [table[f"{name}_ramp_tokens"] for name in ("forward", "backward", "causal")]
    assert ramps == [80.0, 240.0, 400.0]
    assert table["source_kind"] == "measured"
    assert "NVIDIA H200, torch 2.11.0, 2026-11-26" in table["source"]


def test_what_one_length_does_not_tell_stays(tmp_path: Path) -> None:
    known = {
        "shardplan": {
            "forward_ramp_tokens": 59,
            "backward_ramp_tokens": {"value": 1}["value"],
            "causal_ramp_tokens": 386,
        }
    }
    found = read_kernel_rates(written(tmp_path, (4096,), ("causal",)))
    table = attention_tables(found, PEAK, known)["shardplan"]
    assert (table["forward_ramp_tokens"], table["backward_ramp_tokens"], table["causal_ramp_tokens"]) == (
        59.0,
        1.0,
        386.0,
    )
    reached = table["forward"][1] * 4096 / (4096 + 59 + 386)
    assert reached == pytest.approx(float(TRUE.at("forward", 128, 4096, causal=True)), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "has no column 'kernel'"),
        (HEAD + "rotary,D64,shardplan,rate,TFLOP/s,1,1,1," + TAIL + "\n", "holds no rates of attention"),
        (HEAD + "attention forward,D64 full S512,shardplan,rate,TFLOP/s,1,-3,1," + TAIL + "\n", "'-3' TFLOP/s"),
        (HEAD + "attention forward,D64 full S512,shardplan,rate,GB/s,1,3,1," + TAIL + "\n", "'3' GB/s"),
        (
            HEAD
            + "".join(
                "attention forward,D64 full S512,shardplan,rate,TFLOP/s,1,3,1," + TAIL.replace("H200", gpu) + "\n"
                for gpu in ("H100", "H200")
            ),
            "is of several devices: NVIDIA H100, NVIDIA H200",
        ),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_kernel_rates(path)
    assert told in str(caught.value)
    assert caught.value.remedy
    with pytest.raises(InputError, match="cannot be read"):
        read_kernel_rates(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("kept", [192, 215, 260, 330])
def test_a_file_that_is_cut_off(root: Path, tmp_path: Path, kept: int) -> None:
    whole = (root / "reports/measured/h200-2026-11-27/kernels.csv").read_text(encoding="utf-8")
    path = tmp_path / "x.csv"
    path.write_text(whole[: whole.index("attention forward") + kept], encoding="utf-8")
    with pytest.raises(InputError, match=r"is cut off at line \d|no rates of attention|is not positive"):
        read_kernel_rates(path)


def test_rates_of_the_h200_become_its_curves(root: Path) -> None:
    """Curves meet the measured rates at 4,096 tokens; kernels that were not timed stay."""
    rates = read_kernel_rates(root / "reports/measured/h200-2026-11-26/kernels.csv")
    document = cluster_document("h200-ib")
    put_kernels(document["gpu"], rates, document["gpu"]["attention_efficiency"])
    cluster = cluster_from_document(document)
    gpu = cluster.gpu
    assert cluster.provenance["gpu.attention_efficiency.shardplan"].kind == "measured"
    assert cluster.provenance["gpu.attention_efficiency.flash3"].kind != "measured"
    for rate in rates.rates:
        if rate.kernel in ("shardplan", "flash2", "cudnn"):
            curve = gpu.attention_efficiency[rate.kernel]
            reached = float(curve.at(rate.way, rate.width, rate.seq, causal=rate.causal)) * gpu.peak_flop_per_s["bf16"]
            assert reached == pytest.approx(rate.flop_per_s, rel=0.09), rate
    check_device(rates, "NVIDIA H200")
    with pytest.raises(InputError, match="are of 'NVIDIA H200', this machine has 'A CPU'"):
        check_device(rates, "A CPU")
