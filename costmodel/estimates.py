"""`Estimates`: what the cost model answers for N layouts, and what follows from it: throughput, utilisation, whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.error_band import Bands
from shardplan.costmodel.keys import LazyColumns
from shardplan.costmodel.layout import LayoutTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)
Column = TypeVar("Column")

DEFAULT_HEADROOM = 0.05
GIVEN_BACK = 0.5
"""Share of the allocator's slack that it can give back: PyTorch's frees blocks that nothing uses and tries again before it fails, but
not parts of blocks in use. Of the published runs that ran, 33 are called too big with 0, 21 with 0.5, 16 with 1; of the six that ran
out of memory one is called fitting up to 0.6, three with 1."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Answers for N layouts; columns of shape (N,), memory of shape (N, S) for S stages.

    Much of it is gathered from tables of fewer keys whenever it is read: keep what is needed more than once.
    """

    layouts: LayoutTable
    time: Mapping[str, FloatArray]
    """Seconds per step by part (`step_time.TIME_PARTS`) and `step_s`."""
    hidden: Mapping[str, FloatArray]
    """Communication seconds hidden behind compute, by axis; not in step_s."""
    peaks: Mapping[str, FloatArray]
    """Bytes of the fullest stage: allocated, reserved, device."""
    stages: Mapping[str, FloatArray]
    """Bytes by part and stage, (N, S): parameters, gradients, optimizer, activations, buffers, allocated, slack, device, host."""
    contents: Mapping[str, IntArray]
    """`stage_index` and `stage_layer_counts`, (N, S)."""
    context_bytes: float
    capacity_bytes: float
    host_bytes: FloatArray
    """Host memory per node."""
    host_capacity_bytes: float
    nvme_bytes: FloatArray
    """Local flash per node."""
    nvme_capacity_bytes: float
    tokens_per_step: int
    model_flop_per_step: float
    """6 FLOP per matrix parameter and token plus full (not halved) attention; no recompute."""
    hardware_flop_per_step: FloatArray
    """The same with recomputed operators."""
    peak_flop_per_s: float
    bands: Bands
    row_capacity_bytes: FloatArray | None = None
    """Of the GPU that `peaks` are of, (N,), where GPUs differ; else it is `capacity_bytes`."""
    stage_capacity_bytes: FloatArray | None = None
    """Of the GPUs of each stage, (S,), where they differ and all layouts have their stages on the same ones."""

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def step_s(self) -> FloatArray:
        """Seconds per optimizer step."""
        return self.time["step_s"]

    @property
    def device_peak_bytes(self) -> FloatArray:
        """What nvidia-smi would show on the fullest stage."""
        return self.peaks["device"]

    @property
    def capacities(self) -> FloatArray:
        """Memory of the GPU that is fullest, bytes, (N,)."""
        if self.row_capacity_bytes is None:
            return np.broadcast_to(np.float64(self.capacity_bytes), len(self))
        return self.row_capacity_bytes

    @property
    def stage_index(self) -> IntArray:
        """Pipeline stage that each column of `stages` stands for, (N, S)."""
        return self.contents["stage_index"]

    @property
    def stage_layer_counts(self) -> IntArray:
        """Layers of those stages, (N, S)."""
        return self.contents["stage_layer_counts"]

    @property
    def mfu(self) -> FloatArray:
        """Model FLOP utilisation of the dense peak."""
        return self.model_flop_per_step / (self.step_s * self.layouts.gpus * self.peak_flop_per_s)

    @property
    def hfu(self) -> FloatArray:
        """Hardware FLOP utilisation: recomputed operators counted."""
        return self.hardware_flop_per_step / (self.step_s * self.layouts.gpus * self.peak_flop_per_s)

    @property
    def tokens_per_s(self) -> FloatArray:
        """Training throughput of all GPUs."""
        return self.tokens_per_step / self.step_s

    def fits_likely(self) -> NDArray[np.bool_]:
        """The estimate, less what the allocator can give back, fits GPU memory, and what is offloaded the host's."""
        slack = self.peaks["reserved"] - self.peaks["allocated"]
        needed = self.device_peak_bytes - GIVEN_BACK * slack
        return (needed <= self.capacities) & self.fits_below_gpu(0.0)

    def band_of(self, row: int) -> float:
        """Half-width of the band of a layout's step time, relative."""
        return self.bands.of(self.layouts.row(row))

    def fits(self, headroom: float = DEFAULT_HEADROOM) -> NDArray[np.bool_]:
        """The upper edge of the memory band stays `headroom` below the capacity, and what is offloaded that of host memory and flash."""
        return self.fits_gpu(headroom) & self.fits_below_gpu(headroom)

    def fits_gpu(self, headroom: float) -> NDArray[np.bool_]:
        """The same of GPU memory alone."""
        return self.device_peak_bytes * (1.0 + self.bands.memory) <= self.capacities * (1.0 - headroom)

    def fits_below_gpu(self, headroom: float) -> NDArray[np.bool_]:
        """Host memory and flash hold what is offloaded, `headroom` of each left free."""
        on_host = self.host_bytes <= self.host_capacity_bytes * (1.0 - headroom)
        return on_host & (self.nvme_bytes <= self.nvme_capacity_bytes * (1.0 - headroom))

    def take(self, rows: NDArray[np.integer]) -> Estimates:
        """The estimates of `rows`, in that order."""
        return replace(
            self,
            layouts=self.layouts.take(rows),
            time={name: column[rows] for name, column in self.time.items()},
            hidden=_each(self.hidden, lambda found: found[rows]),
            peaks={name: column[rows] for name, column in self.peaks.items()},
            stages=_each(self.stages, lambda found: found[rows]),
            contents=_each(self.contents, lambda found: found[rows]),
            host_bytes=self.host_bytes[rows],
            nvme_bytes=self.nvme_bytes[rows],
            hardware_flop_per_step=self.hardware_flop_per_step[rows],
            row_capacity_bytes=None if self.row_capacity_bytes is None else self.row_capacity_bytes[rows],
        )


def _each(columns: Mapping[str, Column], change: Callable[[Column], Column]) -> Mapping[str, Column]:
    """The columns, changed when they are read."""
    return LazyColumns({name: partial(_changed, columns, name, change) for name in columns})


def _changed(columns: Mapping[str, Column], name: str, change: Callable[[Column], Column]) -> Column:
    return change(columns[name])


def joined(pieces: Sequence[Estimates], layouts: LayoutTable) -> Estimates:
    """The estimates of consecutive pieces of `layouts` as one."""
    if len(pieces) == 1:
        return pieces[0]
    mixed = any(piece.row_capacity_bytes is not None for piece in pieces)
    return replace(
        pieces[0],
        row_capacity_bytes=np.concatenate([piece.capacities for piece in pieces]) if mixed else None,
        stage_capacity_bytes=None,
        layouts=layouts,
        time=_stacked_when_read([piece.time for piece in pieces]),
        hidden=_stacked_when_read([piece.hidden for piece in pieces]),
        peaks=_stacked([piece.peaks for piece in pieces]),
        stages=_stacked_when_read([piece.stages for piece in pieces]),
        contents=_stacked_when_read([piece.contents for piece in pieces]),
        host_bytes=np.concatenate([piece.host_bytes for piece in pieces]),
        nvme_bytes=np.concatenate([piece.nvme_bytes for piece in pieces]),
        hardware_flop_per_step=np.concatenate([piece.hardware_flop_per_step for piece in pieces]),
    )


def _stacked(maps: Sequence[Mapping[str, NDArray[Number]]]) -> dict[str, NDArray[Number]]:
    return {name: _below_each_other([one[name] for one in maps]) for name in maps[0]}


def _stacked_when_read(maps: Sequence[Mapping[str, NDArray[Number]]]) -> Mapping[str, NDArray[Number]]:
    def stack(name: str) -> NDArray[Number]:
        return _below_each_other([one[name] for one in maps])

    return LazyColumns({name: partial(stack, name) for name in maps[0]})


def _below_each_other(columns: Sequence[NDArray[Number]]) -> NDArray[Number]:
    """Columns one below the other; what has fewer stages repeats its last one."""
    if columns[0].ndim == 1:
        return np.concatenate(columns)
    widths: list[int] = [int(column.shape[1]) for column in columns]
    every = np.arange(max(widths))
    return np.concatenate(
        [column[:, np.minimum(every, width - 1)] for column, width in zip(columns, widths, strict=True)]
    )
