"""Checkpoints and failures: how much to save, how often, and which share of the wall time is progress. All arguments broadcast.

C = blocking write of one checkpoint    M = mean time between failures of the job    R = restart    T = work between checkpoints
goodput = T / (M e^(R/M) (e^((T + C)/M) - 1))
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardplan.costmodel.job import BYTES_OF, Job
from shardplan.costmodel.memory import ADAM_MOMENT_BYTES, MASTER_AND_MOMENTS_BYTES, state_columns
from shardplan.costmodel.runtime import Runtime

FloatArray = NDArray[np.float64]

GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
"""About 50,700: 419 unexpected interruptions of 466 in 54 days on 16,384 H100, Llama 3 405B, arXiv 2407.21783 section 3.3.4.
Others: 8,100 and 29,500 (Meta RSC, A100, from memory), 66,500 (504 B200 in 55 days, Lablup)."""
RESTART_S = 600.0
"""From a failure to the loading of the checkpoint: detection, diagnosis, new processes. A guess: MegaScale, arXiv 2402.15627, detects and
diagnoses in less than 10 minutes on average (from memory); Llama 3's "more than 90 % effective time" leaves at most 15."""


def checkpoint_bytes_per_parameter(runtime: Runtime, job: Job, zero: ArrayLike) -> FloatArray:
    """Bytes of one parameter in a checkpoint at each ZeRO stage (shape of `zero`): what the runtime holds of parameters and optimizer.

    At most master, two moments and one copy in the compute dtype: 4 + 4 + 4 + 2 = 14 for Adam in 16 bit, 12 in fp32. What it holds
    beyond that are gradients or a second copy, which nobody saves; FSDP's sharded states are 12 without a 16-bit copy.
    """
    stages = np.asarray(zero, dtype=np.int64)
    columns = state_columns(runtime, job, stages, accumulates=np.zeros(stages.shape, dtype=np.bool_))
    held = sum((columns[part].whole + columns[part].sharded for part in ("parameters", "optimizer")), np.zeros(()))
    master = MASTER_AND_MOMENTS_BYTES - (ADAM_MOMENT_BYTES if job.optimizer == "sgd" else 0.0)
    copy = 0.0 if job.precision == "fp32" else float(BYTES_OF[job.precision])
    return np.minimum(held, master + copy)


def mean_time_between_failures_s(gpus: ArrayLike, gpu_hours_per_failure: ArrayLike) -> FloatArray:
    """M = (GPU-hours per failure) / GPUs: any GPU's failure stops the whole job."""
    return 3600.0 * np.asarray(gpu_hours_per_failure, dtype=np.float64) / np.asarray(gpus, dtype=np.float64)


def young_interval_s(write_s: ArrayLike, mean_time_s: ArrayLike) -> FloatArray:
    """sqrt(2 C M), the minimum of C/T + T/(2 M): J. W. Young, CACM 17 (1974) 530. Good while C is far below M."""
    return np.sqrt(2.0 * np.asarray(write_s, dtype=np.float64) * np.asarray(mean_time_s, dtype=np.float64))


def daly_interval_s(write_s: ArrayLike, mean_time_s: ArrayLike) -> FloatArray:
    """sqrt(2 C M) (1 + sqrt(C/2M)/3 + (C/2M)/9) - C where C < 2 M, else M: J. T. Daly, FGCS 22 (2006) 303, equation 37.

    Work between the end of one checkpoint and the start of the next, failures as a Poisson process.
    """
    write, mean_time = np.asarray(write_s, dtype=np.float64), np.asarray(mean_time_s, dtype=np.float64)
    ratio = write / (2.0 * mean_time)
    series = young_interval_s(write, mean_time) * (1.0 + np.sqrt(ratio) / 3.0 + ratio / 9.0) - write
    return np.where(ratio < 1.0, series, mean_time)


def goodput_fraction(
    interval_s: ArrayLike, write_s: ArrayLike, mean_time_s: ArrayLike, restart_s: ArrayLike
) -> FloatArray:
    """Share of the wall time that is kept work: T / (M e^(R/M) (e^((T + C)/M) - 1)), the complete model of Daly 2006.

    Writes, the work since the last checkpoint that a failure loses and restarts (in which it may fail again) are the rest. For
    T + C far below M this is 1 - C/T - (T/2 + R)/M. Runs into 0 where the job fails faster than it can save.
    """
    interval, write, mean_time, restart = (
        np.asarray(x, dtype=np.float64) for x in (interval_s, write_s, mean_time_s, restart_s)
    )
    with np.errstate(over="ignore"):
        return interval / mean_time * np.exp(-restart / mean_time) / np.expm1((interval + write) / mean_time)
