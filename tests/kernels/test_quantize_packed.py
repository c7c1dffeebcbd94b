"""What of the code kernels no interpreter runs: PTX, read from the source and carried out here; divisions by multiply-adds."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from shardplan.kernels import quantize_tiles

SOURCE = Path(quantize_tiles.__file__).read_text(encoding="utf-8")
ALL = 0xFFFFFFFF
MAGIC = 12582912.0


def carry_out(function: str, outputs: int, inputs: list[int]) -> list[int]:
    """What the PTX in `function` makes of registers `inputs`."""
    text = SOURCE[SOURCE.index(f"def {function}(") :].split('"""{', 1)[1].split('}"""', 1)[0]
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    for line in filter(None, (line.strip() for line in text.split(";"))):
        operation, rest = line.split(None, 1)
        if operation == ".reg":
            continue
        target, *names = (name.strip() for name in rest.split(","))
        registers[target] = apply(operation, [registers[name] if name in registers else int(name, 0) for name in names])
    return [registers[f"${place}"] for place in range(outputs)]


def apply(operation: str, values: list[int]) -> int:
    """One instruction."""
    if operation == "mov.b32":
        return values[0]
    if operation == "shl.b32":
        return values[0] << values[1] & ALL
    if operation == "shr.u32":
        return values[0] >> values[1]
    if operation == "and.b32":
        return values[0] & values[1]
    if operation == "prmt.b32":
        octets = values[0].to_bytes(4, "little") + values[1].to_bytes(4, "little")
        return sum(octets[values[2] >> 4 * place & 7] << 8 * place for place in range(4))
    assert operation == "lop3.b32"
    a, b, c, table = values
    return sum((table >> ((a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)) & 1) << bit for bit in range(32))


def as_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def signed(code: int, bits: int) -> int:
    return code - (1 << bits) if code >> (bits - 1) else code


@pytest.mark.parametrize("start", range(0, 256, 4))
def test_codes_are_read_with_their_offsets(start: int) -> None:
    codes = bytes(range(start, start + 4))
    word = int.from_bytes(codes, "little")
    assert [as_float(bits) for bits in carry_out("decode_bytes", 4, [word])] == [384 + signed(one, 8) for one in codes]
    halves = [one & 0xF for one in codes] + [one >> 4 for one in codes]
    assert [as_float(bits) for bits in carry_out("decode_halves", 8, [word])] == [
        136 + signed(one, 4) for one in halves
    ]


@pytest.mark.parametrize("kept", [0, ALL])
def test_codes_are_packed(kept: int) -> None:
    draw = random.Random(0)
    for _ in range(100):
        codes = [draw.randint(-127, 127) for _ in range(4)]
        packed = int.from_bytes(bytes(one & 0xFF for one in codes), "little")
        assert carry_out("pack_bytes", 1, [*(as_bits(MAGIC + one) for one in codes), kept]) == [packed & kept]
        low, high = ([draw.randint(-7, 7) for _ in range(4)] for _ in range(2))
        packed = int.from_bytes(bytes(a & 0xF | (b & 0xF) << 4 for a, b in zip(low, high, strict=True)), "little")
        assert carry_out("pack_halves", 1, [*(as_bits(MAGIC + one) for one in low + high), kept]) == [packed & kept]


def multiply_add(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """a · b + c of fp32 numbers, rounded once."""
    wide = np.float64(a) * np.float64(b) + np.float64(c)
    # fp64 has rounded before only where its 29 extra bits are those of a tie
    assert not ((wide.view(np.int64) & 0x1FFFFFFF) == 0x10000000).any()
    return wide.astype(np.float32)


@pytest.mark.parametrize("code", [7.0, 127.0])
def test_a_scale_is_the_quotient_rounded_once(code: float) -> None:
    # every mantissa; 448 is 7 · 2^6
    value = np.arange(1 << 23, 1 << 24, dtype=np.float32)
    inverse = np.float32(1.0 / code)
    near = value * inverse
    rest = (np.float64(near) * -code + value).astype(np.float32)
    assert (near != value / np.float32(code)).any()
    assert np.array_equal(multiply_add(rest, inverse, near), value / np.float32(code))


@pytest.mark.parametrize("spacings", [-2, -1, 0, 1, 2])
def test_the_inverse_of_a_scale_is_rounded_once_from_any_near_one(spacings: int) -> None:
    # every scale of 15 significant bits; hardware's approximation is off by one spacing at most
    scale = np.arange(1 << 14, 1 << 15, dtype=np.float32) / np.float32(1 << 14)
    exact = np.float32(1.0) / scale
    near = (exact.view(np.int32) + spacings).view(np.float32)
    error = (1.0 - np.float64(scale) * near).astype(np.float32)
    assert np.array_equal(multiply_add(near, error, near), exact)
