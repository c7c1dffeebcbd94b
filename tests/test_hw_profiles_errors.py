"""What goes wrong in a profile is told in one line: file, field, value, remedy."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from shardplan.hw_profiles.document import PartKind, catalog_folder
from shardplan.hw_profiles.errors import InputError
from shardplan.hw_profiles.load import cluster_document, cluster_from_document, list_parts, load_cluster, load_gpu
from shardplan.hw_profiles.names import spelling
from shardplan.hw_profiles.show import hardware_show

START = '[node]\nbase = "dgx-h100"\n'


def told(tmp_path, text):
    """The complaint about a profile with this text, in one line that names the file."""
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert caught.value.remedy
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            START + "[gpu]\nmemory_gib = 80\n",
            "unknown key gpu.memory_gib; did you mean memory_efficiency or memory_mib?",
        ),
        ("node = 3\n", "node = 3 is not a table; give a table"),
        ("[nodes]\n", "nodes"),
        (START + "[netwrk]\n", "unknown key netwrk; did you mean network"),
        (START + "[node.host]\ncore = 3\n", "unknown key node.host.core; did you mean cores"),
        (START + "[gpu.peak_tflops]\nbf61 = 3\n", "unknown key gpu.peak_tflops.bf61; did you mean bf16"),
        (START + "[gpu]\nmemory_mib = 0\n", "gpu.memory_mib = 0 is not above 0; give a number above 0"),
        (START + "[gpu]\nmemory_mib = -5.5\n", "gpu.memory_mib = -5.5 is not above 0"),
        (START + "[gpu]\nmemory_mib = inf\n", "gpu.memory_mib = inf is not finite"),
        (START + '[gpu]\nmemory_mib = "80GB"\n', "gpu.memory_mib = '80GB' is not a number; give a number"),
        (START + "[gpu]\nmemory_mib = true\n", "gpu.memory_mib = True is not a number"),
        (START + "[gpu]\nmemory_mib = { valu = 3 }\n", "unknown key gpu.memory_mib.valu; did you mean value"),
        (
            START + "[network]\noversubscription = 2\n",
            "network.kind is missing; add kind, or start from a catalog part",
        ),
        (START + "[gpu]\nvendor = 3\n", "gpu.vendor = 3 is not a text"),
        (START + '[gpu]\ndevice = "tpu"\n', "gpu.device = 'tpu' is not a known word; use 'cuda', 'cpu' or 'hpu'"),
        (
            START + '[network]\nbase = "ib-ndr"\noversubscription = 0.5\n',
            "network.oversubscription = 0.5 is not at least 1",
        ),
        (START + "gpus = 2.5\n", "node.gpus = 2.5 is not a whole number"),
        ("nodes = 4\n" + START, "the profile has 4 nodes and no network; add [network]"),
        (START + '[node.intra]\nkind = "none"\n', "node has 8 GPUs and intra.kind"),
        (START + "[node.intra]\nbandwidth_gb_per_s = 0\n", "node.intra has kind 'nvswitch' and bandwidth_gb_per_s = 0"),
        (START + '[network]\nbase = "ib-ndr"\nnics_per_node = 0\n', "network needs nics_per_node"),
        (START + "[gpu.memory_efficiency]\nsize_mib = [1, 2]\n", "gpu.memory_efficiency.fraction is missing"),
        (
            START + "[gpu.memory_efficiency]\nsize_mib = [1, 2]\nfraction = [0.5]\n",
            "gpu.memory_efficiency has 2 sizes and 1 fractions",
        ),
        (START + "[gpu.memory_efficiency]\nsize_mib = [2, 1]\nfraction = [0.5, 0.6]\n", "sizes that do not ascend"),
        (START + "[gpu.memory_efficiency]\nsize_mib = [1]\nfraction = [1.5]\n", "fraction.0 = 1.5 is not at most 1.1"),
        (
            START + "[gpu]\nmemory_efficiency = 0.8\n",
            "gpu.memory_efficiency = 0.8 is not a curve (a table of sizes and fractions)",
        ),
        ('[node]\nbase = "dgx-h10"\n', "unknown node 'dgx-h10'; did you mean dgx-"),
        ("[node]\nbase = 3\n", "base = 3 is not a name"),
        (START + 'without = ["nvm"]\n', "without names 'nvm', which the base does not have; did you mean name or nvme"),
        ("[node]\nwithout = 3\n", "without = 3 is not a list"),
        (START + "borrowed = true\n", "borrowed"),
        (START + 'borrowed = " "\n', "borrowed = ' ' is not a text; say why"),
        (START + '[network]\nbase = "ib-ndr"\nrail_optimised = 1\n', "network.rail_optimised = 1 is not true or false"),
        (START + "[storage]\n", "storage says no number; give read_gb_per_s"),
        (START + "[storage]\nread_gb_per_s = 0\n", "storage.read_gb_per_s = 0 is not above 0"),
        (START + "[storage]\nread_gb = 3\n", "unknown key storage.read_gb; did you mean"),
        (START + "[failures]\n", "failures says no number; give gpu_hours_per_failure or restart_minutes"),
        (START + "[failures]\ngpu_hours_per_failure = 0\n", "failures.gpu_hours_per_failure = 0 is not above 0"),
        (START + "[failures]\nrestart_minutes = -1\n", "failures.restart_minutes = -1 is not at least 0"),
        (
            START + "[failures]\nrestart_minute = 1\n",
            "unknown key failures.restart_minute; did you mean restart_minutes",
        ),
        (START + "[gpu]\npower_cap_w = 0\n", "gpu.power_cap_w = 0 is not above 0; give a number above 0"),
        (
            START + "[gpu]\npower_cap_w = 800\n",
            "gpu has power_cap_w = 800 above power_w = 700; give a cap in watts up to",
        ),
        (START + "[gpu]\npower_cap = 500\n", "unknown key gpu.power_cap; did you mean power_cap_w"),
        (
            START + '[gpu]\nwithout = ["power_w"]\npower_cap_w = 500\n',
            "gpu has power_cap_w = 500 and no power_w; give power_w",
        ),
        (START + 'usd_per_hour = { value = 3, date = "July" }\n', "node.usd_per_hour has date = 'July'; write a day"),
        (START + "usd_per_hour = { value = 3, date = 2026 }\n", "node.usd_per_hour.date = 2026 is not a text"),
        (START + 'power_w = { value = 3, date = "2026" }\n', "unknown key node.power_w.date"),
        ('base = "mine.toml"\n', "leads back to itself"),
        ("nodes = 1\n", "gpu is missing"),
        ('[gpu]\nbase = "h200"\n', "node is missing; add node, or start from a catalog part"),
        (
            START + 'source_kind = "rumour"\n',
            "source_kind = 'rumour' is not known; use spec, measured, published, guess",
        ),
        ("source = 3\n" + START, "source = 3 is not a text"),
        ('[node]\nbase = "dgx-h100\n', "is not valid TOML: illegal character '\\n' (at line 2"),
        ("[node]\ngpus = [1,\n", "is not valid TOML: invalid value (at line 2, the end of the file)"),
        (b"\xff\xfe\x00", "is not text (byte 0); save it as UTF-8 TOML"),
        ("", "gpu is missing"),
    ],
)
def test_one_line_names_field_value_and_remedy(tmp_path, text, expected):
    assert expected in told(tmp_path, text)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: no such file; check the path"):
        load_cluster(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="is a folder"):
        load_cluster(tmp_path)


def test_unknown_names_bring_the_nearest():
    with pytest.raises(InputError, match=r"unknown cluster 'h100ibb'; did you mean .*h100-ib"):
        load_cluster("h100ibb")
    with pytest.raises(InputError, match=r"unknown gpu 'h2000'; did you mean .*h200"):
        load_gpu("h2000")
    with pytest.raises(InputError, match=r"unknown kind of part 'gpu'; did you mean gpus"):
        list_parts("gpu")  # pyright: ignore[reportArgumentType]


def test_a_damaged_document_says_where():
    document = cluster_document("h100-ib")
    del document["node"]["intra"]
    with pytest.raises(InputError, match=r"plan\.json: node\.intra is missing"):
        cluster_from_document(document, place="plan.json")
    with pytest.raises(InputError, match="is not a table"):
        cluster_from_document({**document, "gpu": "h100"}, place="plan.json")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dgx-h100", "'dgx-h100' is a node, not a cluster; clusters with it: eos, h100-ib"),
        ("h100-sxm", "'h100-sxm' is a gpu, not a cluster; clusters with it: aws-p5, "),
        ("rtx-4090", "'rtx4090' is a gpu, not a cluster; clusters with it: 8x4090"),
        ("DGX A100", "'dgx-a100' is a node, not a cluster; clusters with it: a100-roce, "),
        ("ib-ndr", "'ib-ndr' is a network, not a cluster; clusters with it: "),
    ],
)
def test_a_part_of_another_kind_is_named(name: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        load_cluster(name)
    assert told in str(caught.value)


def test_names_in_any_case() -> None:
    assert load_cluster("H100-IB").name == load_cluster("h100-ib").name
    assert hardware_show("H100-IB")["kind"] == "cluster"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("rtx-4090", "rtx4090"),
        ("RTX 3090", "rtx3090"),
        ("rtx-6000-ada", "rtx6000-ada"),
        ("gaudi-2", "gaudi2"),
        ("GB200 NVL72", "gb200-nvl72"),
        ("DGX A100", "dgx-a100"),
        ("p4d", "aws-p4d"),
        ("p5", "aws-p5"),
        ("P5en", "aws-p5en"),
        ("a100-80gb-sxm", "a100-80gb"),
        ("h100-96gb-sxm-500w", "h100-96gb-500w"),
        ("h200-141gb-sxm", "h200"),
        ("rtx6000ada", "rtx6000-ada"),
    ],
)
def test_other_names_for_one_part(word: str, name: str) -> None:
    assert hardware_show(word)["name"] == name


@pytest.mark.parametrize(
    ("word", "entries"),
    [
        ("h100", ("h100-96gb-500w", "h100-ib", "h100-nvl", "h100-pcie", "h100-sxm")),
        ("v100", ("v100-16gb", "v100-32gb", "v100-32gb-450w")),
        ("a800", ("a800-80gb", "a800-ib")),
        ("h100-96gb", ("h100-96gb-500w",)),
        ("p6", ("aws-p6-b200", "aws-p6-b300")),
        ("RoCE", ("roce-200", "roce-400", "roce-400-pods")),
        ("efa", ("efa-3200", "efa-400", "efa-6400")),
        ("omni-path", ("omni-path-100",)),
        ("ethernet", ("ethernet-100",)),
    ],
)
def test_a_word_that_several_parts_fit_is_answered_with_those(word: str, entries: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        hardware_show(word)
    assert str(caught.value) == f"{word!r} may mean {', '.join(entries)}; name one of them"


def test_no_name_means_two_parts_of_a_kind_and_every_other_name_means_one() -> None:
    """Memory sizes and rates stay apart: spellings of catalog names differ, and other names lead to a name of the catalog."""
    kinds: tuple[PartKind, ...] = ("clusters", "nodes", "networks", "gpus")
    for kind in kinds:
        assert len({spelling(name) for name in list_parts(kind)}) == len(list_parts(kind))
    text = (files("shardplan.hw_profiles") / "catalog" / "names.toml").read_text(encoding="utf-8")
    every = {name for kind in kinds for name in list_parts(kind)}
    for word, name in tomllib.loads(text).items():
        assert name in every and word not in every
        for size in re.findall(r"(\d+)gb", word):
            assert load_gpu(name).memory_bytes / 2**30 == pytest.approx(float(size), rel=0.02)
    assert spelling("llama-27b") != spelling("llama-2-7b")


@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [("nodes", "dgx-h100", "node"), ("gpus", "h100-sxm", "gpu"), ("networks", "ib-ndr", "network")],
)
def test_a_file_of_one_part_is_shown(kind: PartKind, name: str, shown: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text((catalog_folder(kind) / f"{name}.toml").read_text(encoding="utf-8"), encoding="utf-8")
    found = hardware_show(path)
    assert found["kind"] == shown
    assert found["sections"] == hardware_show(name)["sections"]
