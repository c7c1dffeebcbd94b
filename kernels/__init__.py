"""GPU kernels of the executor, in Triton, each with its formula, its sources and a plain PyTorch reference beside it."""

if __name__ != "shardplan.kernels":
    raise ImportError(
        f"this folder is the package shardplan.kernels; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.kernels."
    )
