"""The machine as data: GPUs, links, nodes, networks and clusters, each number with its unit and its source.

`machine` holds the classes (SI units, no file formats), `load` reads catalog parts and user profiles, `write` writes one,
`detect` describes the machine it runs on, `topology` turns a cluster into a graph and a table of tiers, `show` lists it all.
"""

if __name__ != "shardplan.hw_profiles":
    raise ImportError(
        f"this folder is the package shardplan.hw_profiles; it was imported as {__name__!r}. "
        "Install the project (pip install -e .) and import shardplan.hw_profiles."
    )
