"""How the kernels of block-quantised codes are launched: elements a program handles and its warps, by step and kind of code.

The one place to change after `code_tuning` has timed candidates on a GPU; results do not hang on what stands here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel's launch."""

    tile: int
    """Elements a program handles: a power of two; a larger block is a tile of its own."""
    warps: int
    packed: bool = True
    """Whether codes are packed four a register in PTX; else by Triton's own operations."""

    def elements(self, block: int) -> int:
        """Elements a program handles when `block` of them share a scale."""
        return max(self.tile, block)

    def warps_for(self, block: int) -> int:
        """Warps of a program: more where a block is larger than the tile, for no more than 32 elements a thread."""
        return self.warps if block <= self.tile else max(self.warps, block // 1024)


LAUNCHES: dict[tuple[str, str], Launch] = {
    ("quantize", "int8"): Launch(tile=4096, warps=4),
    ("quantize", "int4"): Launch(tile=4096, warps=4),
    ("quantize", "fp8"): Launch(tile=4096, warps=4),
    ("dequantize", "int8"): Launch(tile=2048, warps=4),
    ("dequantize", "int4"): Launch(tile=4096, warps=8),
    ("dequantize", "fp8"): Launch(tile=2048, warps=4),
    ("reduce", "int8"): Launch(tile=2048, warps=2),
    ("reduce", "int4"): Launch(tile=4096, warps=4),
    ("reduce", "fp8"): Launch(tile=2048, warps=2),
}
"""By (step, kind), the fastest on an H200 (reports/measured/h200-2026-11-26/code_tuning.csv; reductions: 2026-11-27). All reach 0.91 of
a copy and more but reductions of int4, 0.80 of one of 512 MiB: they move so little that a copy of as many bytes reaches 0.88."""
