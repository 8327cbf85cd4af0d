"""Processes that somebody else started together: torchrun, srun, or `Workers`."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gnnmd.parallel.ranks import Ranks


@dataclass(frozen=True)
class World:
    """This process among those that were started together.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes.
        local_rank: number of this process on its host; its GPU.
        address: host of rank 0.
        port: free port there.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "World | None":
        """Return what torchrun or srun says about this process; None if neither started it.

        Raises:
            ValueError: variables that contradict each other.
        """
        if "RANK" in variables and "WORLD_SIZE" in variables:
            return cls(
                rank=int(variables["RANK"]),
                size=int(variables["WORLD_SIZE"]),
                local_rank=int(variables.get("LOCAL_RANK", 0)),
                address=variables.get("MASTER_ADDR", "127.0.0.1"),
                port=int(variables.get("MASTER_PORT", 29500)),
            )
        # A batch script has these variables too, for one task; srun adds the step's.
        if "SLURM_STEP_ID" in variables and int(variables.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return cls(
                rank=int(variables["SLURM_PROCID"]),
                size=int(variables["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(variables["SLURM_LOCALID"]),
                address=variables.get("MASTER_ADDR", first_host(variables["SLURM_STEP_NODELIST"])),
                # Steps that run side by side must not meet: a port per job and step.
                port=int(variables.get("MASTER_PORT", 0)) or _step_port(variables),
            )
        return None

    @contextmanager
    def joined(self, device: str) -> Iterator[Ranks]:
        """Join the other processes, on the GPU of this rank ("cuda") or on the CPU ("cpu"); collective.

        Raises:
            ValueError: this host has fewer GPUs than processes.
        """
        if device == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"process {self.local_rank} of this host has no GPU: torch sees "
                    f"{torch.cuda.device_count()}. Start one process per GPU, or use the CPU"
                )
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            # torchrun and `Workers` hold the server of this address themselves and say so in the environment.
            init_method="env://" if "RANK" in os.environ else f"tcp://{self.address}:{self.port}",
            rank=self.rank,
            world_size=self.size,
        )
        try:
            yield Ranks(dist.group.WORLD)
        finally:
            dist.destroy_process_group()


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list: ``node[03-07,9],other`` -> ``node03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR")
    return match[1] + (match[2] or "")


def _step_port(variables: Mapping[str, str]) -> int:
    step = variables["SLURM_STEP_ID"]
    number = int(variables["SLURM_JOB_ID"]) * 31 + (int(step) if step.isdigit() else 0)
    return 20_000 + number % 12_000  # below the ports that systems hand out themselves
