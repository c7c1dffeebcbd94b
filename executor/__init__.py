"""Runs a plan: starts the ranks, builds the model, spreads it as the layout says, trains it, measures it.

Reading order: `launch.py` (starts and watches the ranks) -> `train.py` (what one rank does) -> `parallelize.py` (the
recipe) -> `mesh.py`, `tensor_parallel.py`, `recompute.py`, `zero.py`, `pipeline.py`, `checkpoint.py` (one mechanism each).
Importing this package does not import torch; `launch`, `following`, `failure`, `check`, `checkpoint_files`, `data`, `measure`
and `recorder` do not either.
"""

if __name__ != "shardplan.executor":
    raise ImportError(
        f"this folder is the package shardplan.executor; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.executor."
    )
