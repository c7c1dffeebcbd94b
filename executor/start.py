"""How a rank joins the others, also after torchrun has started all of them again."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from shardplan.hw_profiles.errors import InputError
from shardplan.planner.plan import Plan


def start_process_group(device: str, timeout: timedelta) -> torch.device:
    """Join the ranks that torchrun started; returns this rank's device. No collective waits longer than `timeout`.

    Names in torchrun's store carry the number of the restart: gloo would else find addresses of ranks that are gone.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, so it outlives the ranks
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    base = TCPStore(address, port, world, is_master=rank == 0 and not hosted, timeout=timeout)
    store = PrefixStore(f"restart-{restart_count()}", base)
    chosen = torch.device("cpu")
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=chosen if device == "cuda" else None,
    )
    return chosen


def restart_count() -> int:
    """How often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def check_world_size(plan: Plan) -> None:
    """Refuse a number of processes that is not the plan's."""
    world = int(os.environ["WORLD_SIZE"])
    if world != plan.gpus:
        raise InputError(
            f"the plan is for {plan.gpus} processes, {world} were started", remedy="start as many as it says"
        )
