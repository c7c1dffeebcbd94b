"""Planner: every layout of a model on a cluster, ranked and explained; the plan file."""

if __name__ != "shardplan.planner":
    raise ImportError(
        f"this folder is the package shardplan.planner; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.planner."
    )
