"""What scripts of ranks share: a process group that leaves nothing behind, so that one process can run layout after layout.

Each gloo group has threads that wake a hundred times a second, also after `destroy_process_group`, as long as anything holds the group:
after thirty layouts of four ranks they took a third of the time.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


@functools.cache
def _store() -> Store:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


@contextmanager
def process_group(name: str) -> Iterator[None]:
    """A gloo group of all ranks for the code inside; `name` is given once a job, and by every rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = PrefixStore(name, _store())
    dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    yield
    dist.barrier()
    dist.destroy_process_group()
    _forget_meshes()


def _forget_meshes() -> None:
    """Empty what torch remembers by mesh. It goes by shape too: the next layout would be told of groups that are gone."""
    _clear_sharding_prop_cache()
    getattr(_redistribute, "clear_redistribute_planner_cache", lambda: None)()  # not in every torch
    for one in _caches(len(sys.modules)):
        one.cache_clear()
    gc.collect()


@functools.cache
def _caches(_modules: int) -> list[functools._lru_cache_wrapper[Any]]:
    """Those of torch.distributed, looked for anew once there are more modules."""
    every = [one for one in gc.get_objects() if type(one) is functools._lru_cache_wrapper]
    return [one for one in every if str(getattr(one, "__module__", "")).startswith("torch.distributed")]
