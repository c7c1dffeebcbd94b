"""What `validate_device` runs on one device: jobs that change one thing at a time, the most informative first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import Layout
from shardplan.costmodel.model import Model
from shardplan.costmodel.model_config import load_model


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training job of one device."""

    seq: int
    model: str = "llama-3-8b"
    layers: int = 8
    """Decoder layers kept of the preset."""
    micro_batch: int = 1
    accumulation: int = 1
    """Micro-batches of a step."""
    recompute: str = "none"
    zero: int = 0
    precision: str = "bf16"
    kernel: str = "auto"
    """Attention kernel; auto (this project's on Hopper in 16 bits, else torch's flash), flash (torch's), cudnn or unfused."""
    compiled: bool = False
    """Layers go through torch.compile."""
    profiled: bool = False
    """Also record the device time of each kernel over one step: a last case, since a profiler slows what comes after it."""

    @property
    def name(self) -> str:
        """All words that are not the default: `llama-3-8b:8 seq=4096 mb=2 full`."""
        words = [f"{self.model}:{self.layers}", f"seq={self.seq}", f"mb={self.micro_batch}"]
        words += [f"acc={self.accumulation}"] if self.accumulation > 1 else []
        words += [self.recompute] if self.recompute != "none" else []
        words += [f"zero={self.zero}"] if self.zero else []
        words += [self.precision] if self.precision != "bf16" else []
        words += [self.kernel] if self.kernel != "auto" else []
        words += ["compiled"] if self.compiled else []
        words += ["profiled"] if self.profiled else []
        return " ".join(words)

    @property
    def runtime(self) -> str:
        """What runs and predicts it."""
        return "shardplan+compile" if self.compiled else "shardplan"

    def shapes(self) -> Model:
        """The preset with its first `layers` layers; what a config.json with another num_hidden_layers gives."""
        whole = load_model(self.model)
        return replace(whole, name=f"{self.model}-{self.layers}-layers", layers=((whole.layers[0][0], self.layers),))

    def job(self) -> Job:
        """One step is all the micro-batches."""
        return Job(seq=self.seq, global_batch=self.micro_batch * self.accumulation, precision=self.precision)

    def layout(self) -> Layout:
        """One GPU."""
        attention = "flash" if self.kernel == "cudnn" else self.kernel
        return Layout(micro_batch=self.micro_batch, zero=self.zero, recompute=self.recompute, attention=attention)


GPU_CASES = (
    # what the executor switches: compiled, 16-bit formats, experts, recompute, kernels
    Case(seq=4096, micro_batch=2, compiled=True),
    Case(seq=4096, micro_batch=2),
    Case(seq=4096, micro_batch=2, precision="fp16"),
    Case(seq=4096, model="mixtral-8x7b", layers=2, micro_batch=2),
    Case(seq=8192, micro_batch=2, recompute="selective:layernorm+act"),
    Case(seq=4096, micro_batch=2, recompute="full", compiled=True),
    Case(seq=4096, micro_batch=2, recompute="full"),
    Case(seq=4096, micro_batch=2, recompute="selective"),
    Case(seq=4096, micro_batch=1, kernel="unfused"),
    Case(seq=8192, kernel="flash"),
    Case(seq=1024, model="gpt2-xl", layers=48, micro_batch=8, compiled=True),
    Case(seq=8192, micro_batch=2),
    Case(seq=4096, model="mixtral-8x7b", layers=2, micro_batch=2, recompute="full"),
    Case(seq=16384, recompute="full"),
    Case(seq=4096, layers=28, recompute="full"),
    Case(seq=4096, model="llama-2-7b", layers=8, micro_batch=2),
    Case(seq=2048, micro_batch=2, accumulation=4, recompute="full"),
    Case(seq=8192, layers=20, recompute="selective"),
    Case(seq=2048, micro_batch=4, precision="fp16", recompute="full", accumulation=2),
    Case(seq=4096, zero=3, accumulation=2, compiled=True),
    Case(seq=8192, micro_batch=3),
    Case(seq=8192, micro_batch=2, recompute="selective"),
    Case(seq=2048, layers=4, precision="fp32"),
    Case(seq=8192, micro_batch=4, recompute="full"),
    Case(seq=1024, micro_batch=1),
    Case(seq=8192, layers=4, micro_batch=2),
    Case(seq=256, model="tiny", layers=4, micro_batch=4),
    # sizes
    Case(seq=8192),
    Case(seq=4096, layers=16),
    Case(seq=4096, micro_batch=4),
    Case(seq=2048, micro_batch=4),
    Case(seq=4096, zero=3, accumulation=2),
    Case(seq=4096, zero=2, accumulation=2),
    Case(seq=1024, model="gpt2-xl", layers=48, micro_batch=8),
    Case(seq=4096, model="llama-3.2-1b", layers=16, micro_batch=4),
    Case(seq=4096, layers=4),
    Case(seq=4096, layers=26, micro_batch=2, recompute="full"),
    Case(seq=4096, micro_batch=2, kernel="flash"),
    Case(seq=8192, kernel="cudnn"),
    Case(seq=4096, accumulation=4),
    Case(seq=4096, layers=24, recompute="full"),
    Case(seq=2048, micro_batch=1),
    # profiled: the budget keeps room for them
    Case(seq=4096, micro_batch=2, compiled=True, profiled=True),
    Case(seq=4096, model="mixtral-8x7b", layers=2, micro_batch=2, profiled=True),
    Case(seq=8192, micro_batch=2, recompute="selective:layernorm+act", profiled=True),
)
CPU_CASES = (
    Case(seq=128, model="tiny", layers=2, micro_batch=2, precision="fp32"),
    Case(seq=128, model="tiny", layers=2, micro_batch=2, accumulation=2, recompute="full"),
    Case(seq=128, model="tiny", layers=2, micro_batch=2, recompute="selective", precision="fp32"),
    Case(seq=128, model="tiny", layers=2, micro_batch=2, precision="fp32", profiled=True),
)
"""To try the program; a CPU has no case of its own to make."""
