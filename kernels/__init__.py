"""GPU kernels of the executor, in Triton; none is shipped yet: attention and norms are PyTorch's own."""

if __name__ != "shardplan.kernels":
    raise ImportError(
        f"this folder is the package shardplan.kernels; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.kernels."
    )
