"""Plans and runs as tables, figures and one self-contained page: inputs -> tables -> plots -> page."""

if __name__ != "shardplan.reports":
    raise ImportError(
        f"this folder is the package shardplan.reports; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.reports."
    )
