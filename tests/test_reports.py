"""`shardplan report`: inputs are checked, tables add up, the page is whole, self-contained and escaped."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model_config import load_model
from shardplan.planner.plan import Plan
from shardplan.reports import tables
from shardplan.reports.inputs import read_inputs
from shardplan.reports.page import write_report

GIB = 2**30
LARGE = (
    "dp=2 tp=8 pp=4 micro_batch=1 zero=1 sequence_parallel=true recompute=selective schedule=interleaved "
    "virtual_stages=5"
)
TIME = {"compute_s": 61.2, "recompute_s": 1.9, "tp_exposed_s": 9.7, "cp_exposed_s": 0.0, "ep_exposed_s": 0.0}
TIME |= {"dp_exposed_s": 1.1, "pp_exposed_s": 0.9, "bubble_s": 0.6, "optimizer_s": 0.2, "host_s": 0.05}


def prediction(
    *, stages: int, stage_gib: float, capacity_gib: float, time: dict[str, float], tokens: int, gpus: int
) -> Any:
    """What `estimate --json` answers, in plausible proportions."""
    shares = {"parameters": 0.14, "gradients": 0.26, "optimizer": 0.2, "activations": 0.28, "buffers": 0.04}
    shares |= {"allocator_slack": 0.05, "context": 0.03}
    rows: list[dict[str, Any]] = []
    for stage in range(stages):
        held = stage_gib * GIB * (1 - 0.04 * stage)
        row: dict[str, Any] = {"stage": stage, "layers": 20}
        row |= {f"{part}_bytes": held * share for part, share in shares.items()}
        rows.append(row | {"allocated_bytes": held * 0.92, "device_bytes": held})
    step_s, peak = sum(time.values()), stage_gib * GIB
    memory = {"capacity_bytes": capacity_gib * GIB, "allocated_peak_bytes": peak * 0.92}
    memory |= {"reserved_peak_bytes": peak * 0.97, "device_peak_bytes": peak}
    return {
        "fits": True,
        "fits_likely": True,
        "rejections": [],
        "memory": {**memory, "host_bytes": 0, "nvme_bytes": 0, "stages": rows},
        "time": {"step_s": step_s, **time, "hidden": {"dp_s": step_s * 0.03, "pp_s": 0.0}},
        "throughput": {
            "tokens_per_s": tokens / step_s,
            "tokens_per_s_per_gpu": tokens / step_s / gpus,
            "mfu": 0.472,
            "hfu": 0.488,
        },
        "cost": {"usd_per_step": None},
        "error_band": {"step_s": [step_s * 0.92, step_s * 1.09], "device_peak_bytes": [peak * 0.96, peak * 1.05]},
        "assumptions": ["dp collectives overlap the backward pass", "network.latency_us is a guess: 5 µs a hop"],
    }


def make_plan(model: str, *, job: Job, words: str, cluster: str, prediction: Any, search: Any = None) -> Plan:
    """A plan document as the planner would write it."""
    layout = parse_layout(words)
    return Plan(
        model=load_model(model),
        job=job,
        cluster={"name": cluster},
        gpus=layout.gpus,
        runtime="shardplan",
        layout=layout,
        prediction=prediction,
        search=search or {},
        digests={"model": "ab" * 32, "cluster": "cd" * 32},
        shardplan_version="0.1.0",
    )


def large_plan(*, name: str = "h100-ib") -> Plan:
    """A 70B on 64 GPUs with five runners-up."""
    job = Job(seq=8192, global_batch=1024)
    made = prediction(stages=4, stage_gib=68.5, capacity_gib=79.6, time=TIME, tokens=job.tokens_per_step, gpus=64)
    best_s = made["time"]["step_s"]
    others = [parse_layout(LARGE).words(), *(f"dp={2**i} tp=8 pp={8 // 2**i} micro_batch=1 zero=1" for i in range(4))]
    ranked = [
        {
            "rank": rank + 1,
            "layout": words,
            "step_s": best_s * (1 + 0.023 * rank),
            "tokens_per_s_per_gpu": job.tokens_per_step / best_s / 64 / (1 + 0.023 * rank),
            "mfu": 0.472 / (1 + 0.023 * rank),
            "device_peak_bytes": (68.5 + rank) * GIB,
            "headroom_fraction": 1 - (68.5 + rank) / 79.6,
        }
        for rank, words in enumerate(others)
    ]
    refused = {
        "memory": {"count": 4210, "reason": "needs 131 GiB of 79.6 GiB"},
        "tp-divides-heads": {"count": 12, "reason": "tp=48 does not divide heads=64"},
    }
    search = {"looked_at": 18432, "refused": refused, "seconds": 0.41, "ranked": ranked}
    return make_plan("llama-3-70b", job=job, words=LARGE, cluster=name, prediction=made, search=search)


def write_run(folder: Path, words: str, *, slower: float = 1.0, kind: str = "allocated", offset: float = 0.0) -> Path:
    """A run folder as `shardplan run` leaves it."""
    folder.mkdir(parents=True)
    job = Job(seq=256, global_batch=8)
    time = {"compute_s": 0.31, "dp_exposed_s": 0.05, "optimizer_s": 0.02, "host_s": 0.01}
    made = prediction(stages=1, stage_gib=0.9, capacity_gib=12, time=time, tokens=job.tokens_per_step, gpus=2)
    make_plan("tiny", job=job, words=words, cluster="this-machine", prediction=made).write(folder / "plan.json")
    step_s = made["time"]["step_s"] * slower
    losses = [10.4 - 0.11 * step + 0.02 * (step % 3) + offset for step in range(1, 31)]
    lines = ["step,rank,metric,value,unit"]
    for step, loss in enumerate(losses, start=1):
        lines.append(f"{step},0,loss_metrics/global_avg_loss,{loss},")
        lines.extend(f"{step},{rank},time_metrics/end_to_end(s),{step_s},s" for rank in range(2))
    (folder / "measurements.csv").write_text("\n".join(lines) + "\n")
    measured = {"step_s": step_s, "step_s_p20": step_s * 0.97, "step_s_p80": step_s * 1.06}
    measured |= {"tokens_per_s": job.tokens_per_step / step_s, "peak_memory_bytes": 0.85 * GIB, "memory_kind": kind}
    record = {
        "plan": "plan.json",
        "device": "cpu",
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "world_size": 2,
        "steps": 30,
        "warmup_steps": 5,
        "measured": {**measured, "first_loss": losses[0], "last_loss": losses[-1]},
        "predicted": {
            "step_s": made["time"]["step_s"],
            "tokens_per_s": made["throughput"]["tokens_per_s"],
            "device_peak_bytes": made["memory"]["device_peak_bytes"],
        },
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One plan and two runs."""
    large_plan().write(tmp_path / "llama-3-70b.json")
    write_run(tmp_path / "runs" / "tiny-zero3", "dp=2 zero=3")
    write_run(tmp_path / "runs" / "tiny-pp2", "pp=2", slower=1.31)
    return tmp_path


class Tags(HTMLParser):
    """Opening tags, identifiers and whether every tag is closed."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_shows_plan_and_runs(folder: Path) -> None:
    page = write_report([folder / "llama-3-70b.json", folder / "runs"], folder / "out").read_text()
    for expected in (
        "llama-3-70b on 64 GPUs of h100-ib",
        LARGE,
        "47.2 %",
        "18,432 layouts",
        "needs 131 GiB",
        "tiny-pp2",
    ):
        assert expected in page
    assert "&lt;svg" not in page


def test_page_is_self_contained_and_well_formed(folder: Path) -> None:
    page = write_report([folder / "llama-3-70b.json", folder / "runs"], folder / "out").read_text()
    tags = Tags(page)
    assert tags.open == []
    names = {name for name, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "image"}
    assert sum(name == "svg" for name, _ in tags.seen) == 4
    identifiers = [attributes["id"] for _, attributes in tags.seen if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))
    references = [value for _, a in tags.seen for key, value in a.items() if key in ("src", "href", "xlink:href")]
    assert all(value and value.startswith("#") for value in references)
    assert "@import" not in page
    assert "url(http" not in page


def test_same_inputs_same_page(folder: Path) -> None:
    paths = [folder / "llama-3-70b.json", folder / "runs"]
    first = write_report(paths, folder / "out").read_bytes()
    assert write_report(paths, folder / "out").read_bytes() == first
    assert [entry.name for entry in (folder / "out").iterdir()] == ["index.html"]


def test_names_are_escaped(tmp_path: Path) -> None:
    large_plan(name="<script>alert('a & b')</script>").write(tmp_path / "<b>.json")
    run = write_run(tmp_path / "<i>$x_1$ --> <script>", "dp=2 zero=3")
    page = write_report([tmp_path / "<b>.json", run], tmp_path / "out").read_text()
    tags = {name for name, _ in Tags(page).seen}
    assert not tags & {"script", "i", "b"}
    assert "&lt;script&gt;alert(&#x27;a &amp; b&#x27;)&lt;/script&gt;" in page


def test_runs_alone_show_their_plans(folder: Path) -> None:
    page = write_report([folder / "runs" / "tiny-pp2"], folder / "out").read_text()
    assert "tiny on 2 GPUs of this-machine" in page
    assert "The layout was given, not searched for." in page


def test_tables_add_up(folder: Path) -> None:
    inputs = read_inputs([folder / "llama-3-70b.json"])
    (plan,) = inputs.plans
    memory = tables.memory_table(plan)
    for stage, row in enumerate(plan.stages()):
        assert memory[memory["stage"] == stage]["bytes"].sum() == pytest.approx(row["device_bytes"])
    time = tables.time_table(plan)
    assert time["seconds"].sum() == pytest.approx(plan.number("time.step_s"))
    assert "context parallel" not in set(time["part"])
    (facts,) = tables.records(tables.headline_table([plan]))
    assert facts["headroom_fraction"] == pytest.approx(1 - 68.5 / 79.6)
    ranked = tables.records(tables.runner_up_table(plan))
    assert [row["rank"] for row in ranked] == [1, 2, 3, 4, 5]
    assert ranked[1]["slower_fraction"] == pytest.approx(0.023)
    assert list(tables.refused_table(plan)["count"]) == [4210, 12]


def test_a_time_part_of_a_later_version_is_shown(folder: Path) -> None:
    (plan,) = read_inputs([folder / "llama-3-70b.json"]).plans
    time = {**plan.plan.prediction["time"], "checkpoint_write_s": 2.5}
    later = dataclasses.replace(plan.plan, prediction={**plan.plan.prediction, "time": time})
    assert "checkpoint write" in set(tables.time_table(dataclasses.replace(plan, plan=later))["part"])


def test_prediction_is_compared_with_the_same_kind_of_memory(folder: Path) -> None:
    write_run(folder / "runs" / "device", "dp=2 zero=1", kind="device")
    rows = {
        (row["run"], row["quantity"]): row
        for row in tables.records(tables.comparison_table(read_inputs([folder / "runs"]).runs))
    }
    assert rows["tiny-zero3", "peak memory (allocated)"]["predicted"] == pytest.approx(0.9 * 0.92 * GIB)
    assert rows["device", "peak memory (device)"]["predicted"] == pytest.approx(0.9 * GIB)
    assert rows["tiny-zero3", "step time"]["ratio"] == pytest.approx(1)
    assert rows["tiny-zero3", "step time"]["inside"] is True
    assert rows["tiny-pp2", "step time"]["ratio"] == pytest.approx(1.31)
    assert rows["tiny-pp2", "step time"]["inside"] is False
    assert rows["tiny-pp2", "throughput"]["inside"] is False


def test_a_run_says_which_prediction_its_memory_means(folder: Path) -> None:
    path = folder / "runs" / "tiny-pp2" / "run.json"
    record = json.loads(path.read_text())
    record["measured"]["memory_kind"] = "rss"
    record["predicted"] |= {"peak_memory_bytes": 0.5 * GIB, "peak_memory_is": "device_peak_bytes"}
    path.write_text(json.dumps(record))
    row = tables.records(tables.comparison_table(read_inputs([path.parent]).runs))[-1]
    assert row["quantity"] == "peak memory (resident set)"
    assert row["predicted"] == pytest.approx(0.5 * GIB)


def test_a_failed_run_is_shown_as_one(folder: Path) -> None:
    path = folder / "runs" / "tiny-pp2" / "run.json"
    record = json.loads(path.read_text())
    record["measured"] = dict.fromkeys(record["measured"]) | {"memory_kind": "rss"}
    path.write_text(json.dumps({**record, "steps_done": 0, "error": "RuntimeError: out of <memory>"}))
    (path.parent / "measurements.csv").write_text("step,rank,metric,value,unit\n")
    page = write_report([path.parent], folder / "out").read_text()
    assert "0 of 30" in page
    assert "tiny-pp2 failed: RuntimeError: out of &lt;memory&gt;" in page


def test_runs_are_called_by_what_they_ran(tmp_path: Path) -> None:
    for second in (1, 2):
        write_run(tmp_path / f"20260102T03040{second}Z-tiny-zero3", "dp=2 zero=3")
    assert [run.name for run in read_inputs([tmp_path]).runs] == ["tiny-zero3", "tiny-zero3 (2)"]


def test_loss_is_one_value_a_step(folder: Path) -> None:
    losses = tables.loss_table(read_inputs([folder / "runs"]).runs)
    assert list(losses.groupby("run")["step"].count()) == [30, 30]


def test_command_prints_json_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shardplan.cli.report import report

    report([folder / "llama-3-70b.json"], folder / "out", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"page": str(folder / "out" / "index.html")}
    report([folder / "llama-3-70b.json"], folder / "out")
    assert capsys.readouterr().out == f"wrote {folder / 'out' / 'index.html'}\n"
