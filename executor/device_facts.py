"""What the driver says of the first GPU, for the header of whatever was measured on it."""

from __future__ import annotations

import subprocess

_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "most_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
"""Our name -> nvidia-smi's."""
_TIMEOUT_S = 10.0


def device_facts() -> dict[str, str]:
    """Driver, clocks, power and temperature of GPU 0 at this moment; empty without a working nvidia-smi."""
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {}
    return parse_facts(done.stdout) if done.returncode == 0 else {}


def parse_facts(line: str) -> dict[str, str]:
    """The answer to the query above; what the driver does not tell ("[N/A]", "[Not Supported]") is left out."""
    values = [value.strip() for value in line.strip().splitlines()[0].split(",")] if line.strip() else []
    if len(values) != len(_FIELDS):
        return {}
    return {name: value for name, value in zip(_FIELDS, values, strict=True) if not value.startswith("[")}
