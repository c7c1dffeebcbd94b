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


LAUNCHES: dict[tuple[str, str], Launch] = {
    ("quantize", "int8"): Launch(tile=8192, warps=8),
    ("quantize", "int4"): Launch(tile=8192, warps=8),
    ("quantize", "fp8"): Launch(tile=8192, warps=8),
    ("dequantize", "int8"): Launch(tile=8192, warps=8),
    ("dequantize", "int4"): Launch(tile=8192, warps=8),
    ("dequantize", "fp8"): Launch(tile=8192, warps=8),
    ("reduce", "int8"): Launch(tile=4096, warps=8),
    ("reduce", "int4"): Launch(tile=4096, warps=8),
    ("reduce", "fp8"): Launch(tile=4096, warps=8),
}
"""By (step, kind): 32 elements a thread; 16 where eight sources are read, so that the reads of all are in flight together."""
