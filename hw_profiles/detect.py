"""The machine this runs on as a cluster profile, without torch: GPUs through nvidia-smi, else the CPU as one slot per core.

What cannot be read is a marked guess; `shardplan calibrate` replaces guesses by measurements.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.hw_profiles.document import Document, part_document
from shardplan.hw_profiles.errors import InputError

_GPU_NAMES: tuple[tuple[str, str, str], ...] = (
    (r"A100.*PCIe.*80|A100 80GB PCIe", "a100-80gb-pcie", "8x-a100-pcie"),
    (r"A100.*PCIe.*40", "a100-40gb-pcie", "8x-a100-pcie"),
    (r"A100.*80", "a100-80gb", "dgx-a100"),
    (r"A100.*40", "a100-40gb", "dgx-a100"),
    (r"A800-SXM.*80", "a800-80gb", "hgx-a800"),
    (r"GB200", "gb200", "dgx-b200"),
    (r"B200", "b200", "dgx-b200"),
    (r"B300", "b300", "dgx-b200"),
    (r"H200(?! NVL)", "h200", "hgx-h200"),
    (r"H100 NVL", "h100-nvl", "8x-h100-pcie"),
    (r"H100 PCIe", "h100-pcie", "8x-h100-pcie"),
    (r"H100", "h100-sxm", "dgx-h100"),
    (r"H800(?! PCIe| NVL)", "h800", "hgx-h800"),
    (r"H20(?!\d)", "h20", "hgx-h20"),
    (r"V100-SXM.*16", "v100-16gb", "dgx-1v"),
    (r"V100-SXM", "v100-32gb", "dgx-2"),
    (r"L40S", "l40s", "8x-a100-pcie"),
    (r"\bL4\b", "l4", "8x-a100-pcie"),
    (r"\bA10\b", "a10", "8x-a100-pcie"),
    (r"\bA40\b", "a40", "8x-a100-pcie"),
    (r"RTX A6000", "a6000", "8x-a100-pcie"),
    (r"RTX 6000 Ada", "rtx6000-ada", "8x-a100-pcie"),
    (r"RTX 3090(?! Ti)", "rtx3090", "8x4090"),
    (r"RTX 4090(?! D| Laptop)", "rtx4090", "8x4090"),
    (r"RTX 5090(?! D| Laptop)", "rtx5090", "8x5090"),
)
"""nvidia-smi name, catalog GPU, catalog node whose NVLink and host stand in for what cannot be asked."""
_COMMAND_SECONDS = 10
_GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class CpuFacts:
    """What this machine says about its CPU."""

    model: str
    architecture: str
    cores: float
    """CPUs this process may use: affinity and container quota; may be a fraction."""
    ram_bytes: float
    clock_hz: float
    flags: frozenset[str]

    @property
    def fp32_lanes(self) -> int:
        """fp32 numbers per vector instruction."""
        if "avx512f" in self.flags:
            return 16
        return 8 if "avx2" in self.flags or "avx" in self.flags else 4

    @property
    def core_flop_per_s(self) -> float:
        """fp32 peak of one core: two fused multiply-add units, 4 FLOP per lane and cycle."""
        return self.clock_hz * self.fp32_lanes * 4

    @property
    def bf16_gain(self) -> float:
        """bf16 over fp32 matrix rate: AMX, AVX-512 BF16, or none."""
        if "amx_bf16" in self.flags:
            return 8.0
        return 2.0 if "avx512_bf16" in self.flags else 1.0


def localhost_table() -> Document:
    """This machine as the words of a cluster file. InputError only for a GPU that the catalog does not know."""
    found = _nvidia_gpus()
    return _gpu_table(found, cpu_facts()) if found else _cpu_table(cpu_facts())


def cpu_facts() -> CpuFacts:
    """CPU, memory and vector units of this machine; never raises."""
    text = _read("/proc/cpuinfo")
    words = dict(re.findall(r"^([^\t:]+?)\s*:[ \t]*(.*)$", text, flags=re.MULTILINE))
    mac = platform.system() == "Darwin"
    model = words.get("model name") or (_output("sysctl", "-n", "machdep.cpu.brand_string") if mac else "")
    flags = words.get("flags") or words.get("Features") or ""
    if mac:
        features = _output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        flags = features.lower().replace(".", "_")
    return CpuFacts(
        model=model.strip() or platform.processor() or "cpu",
        architecture=platform.machine() or "unknown",
        cores=_usable_cores(),
        ram_bytes=_ram_bytes(mac),
        clock_hz=_clock_hz(words),
        flags=frozenset(flags.split()),
    )


def _nvidia_gpus() -> list[tuple[str, float | None]]:
    """(name, MiB) of each GPU of the first kind; empty without a working nvidia-smi."""
    text = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    rows = [line.rpartition(",") for line in text.splitlines() if "," in line]
    found = [(name.strip(), _positive(mib)) for name, _, mib in rows]
    return [one for one in found if one[0] == found[0][0]]


def _gpu_table(found: list[tuple[str, float | None]], cpu: CpuFacts) -> Document:
    name, mib = found[0]
    match = next((row for row in _GPU_NAMES if re.search(row[0], name, flags=re.IGNORECASE)), None)
    if match is None:
        raise InputError(
            f"GPU {name!r} is not in the catalog",
            place="localhost",
            remedy="measure it with shardplan calibrate -o profile.toml, then give --cluster profile.toml",
        )
    _, gpu, alike = match
    stand_in: dict[str, Any] = part_document("nodes", alike)["node"]
    pcie = part_document("nodes", "8x4090")["node"]["intra"]
    # "NV18" in the matrix means 18 NVLink lanes between two GPUs; without it the way is PCIe.
    linked = re.search(r"\bNV\d+\b", _output("nvidia-smi", "topo", "-m")) is not None
    intra = stand_in["intra"] if linked else pcie
    host = {**stand_in["host"], "cores": max(1, round(cpu.cores)), "ram_gib": cpu.ram_bytes / _GIB}
    memory = {} if mib is None else {"memory_mib": mib}
    return {
        "source": "read from nvidia-smi and the operating system",
        "source_kind": "measured",
        "nodes": 1,
        "gpu": {"base": gpu, **memory},
        "node": {"name": "localhost", "gpus": len(found), "intra": intra, "host": host},
        "network": {"base": "none"},
    }


def _cpu_table(cpu: CpuFacts) -> Document:
    """Every core a slot that one process gets, two at least; cores beyond the machine's are shares of one."""
    slots = max(2, int(cpu.cores))
    share = min(1.0, cpu.cores / slots)
    peak_tflops = cpu.core_flop_per_s * share / 1e12
    total_gb_per_s = max(20.0, 4.0 * slots)
    return {
        "source": "estimated from what the operating system says; measure with shardplan calibrate",
        "source_kind": "guess",
        "nodes": 1,
        "gpu": {
            "base": "cpu",
            "vendor": cpu.model,
            "architecture": cpu.architecture,
            "memory_mib": _measured(cpu.ram_bytes / 2**20 / slots, "this machine's memory over its slots"),
            "bandwidth_gb_per_s": min(10.0, total_gb_per_s / slots),
            "peak_tflops": {"fp32": peak_tflops, "fp16": peak_tflops, "bf16": peak_tflops * cpu.bf16_gain},
            "vector_tflops": peak_tflops / 4,
        },
        "node": {
            "name": "localhost",
            "gpus": slots,
            "intra": {
                "kind": "shared_memory",
                "bandwidth_gb_per_s": 1.5,
                "latency_us": 75,
                "point_to_point_fraction": 1.0,
                "efficiency": {"size_mib": [0.01, 0.1, 1, 10, 100], "fraction": [0.05, 0.2, 0.6, 0.9, 1.0]},
                "source": "gloo over loopback, an order of magnitude; measure with shardplan calibrate",
            },
            "host": {
                "cores": _measured(max(1, round(cpu.cores)), "CPUs this process may use"),
                "ram_gib": _measured(cpu.ram_bytes / _GIB, "this machine's memory"),
                "memory_bandwidth_gb_per_s": total_gb_per_s,
                "memory_efficiency": 0.8,
                "pcie_gb_per_s": min(10.0, total_gb_per_s / slots),
                "adam_bytes_per_parameter": 30,
            },
        },
        "network": {"base": "none"},
    }


def _measured(value: float, text: str) -> Document:
    return {"value": value, "source": text, "source_kind": "measured"}


def _output(*command: str) -> str:
    """What a command prints; empty when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _positive(text: str) -> float | None:
    """The number in `text` when it is one above 0 ("max" and "[N/A]" are none)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _usable_cores() -> float:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    allowed, per = _positive(quota), _positive(period)
    return min(cores, allowed / per) if allowed and per else cores


def _ram_bytes(mac: bool) -> float:
    """Physical memory, or the container's limit where that is less."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), flags=re.MULTILINE)
    physical = float(total[1]) * 1024 if total else None
    if mac:
        physical = _positive(_output("sysctl", "-n", "hw.memsize"))
    limits = (_read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    known = [value for value in (physical, *map(_positive, limits)) if value]
    return min(known, default=4 * _GIB)


def _clock_hz(words: dict[str, str]) -> float:
    """Highest clock the system names; 3 GHz where it names none."""
    khz = _positive(_read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"))
    mhz = _positive(words.get("cpu MHz", ""))
    if khz:
        return khz * 1e3
    return mhz * 1e6 if mhz else 3e9
