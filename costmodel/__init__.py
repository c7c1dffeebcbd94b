"""Cost model: memory and step time of layouts, as arrays; each formula once, on the keys it depends on."""

if __name__ != "shardplan.costmodel":
    raise ImportError(
        f"this folder is the package shardplan.costmodel; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.costmodel."
    )
