"""Processes that somebody else started together: torchrun, srun, or `Workers`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.rendezvous import PATIENCE, JoinError, hosts, meet, patience

#: gloo's own limit; connecting has a shorter one.
_COLLECTIVE = timedelta(minutes=30)


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
            ValueError: a variable that is not what it should be.
        """
        if "RANK" in variables and "WORLD_SIZE" in variables:
            return cls(
                rank=_number("RANK", variables),
                size=_number("WORLD_SIZE", variables),
                local_rank=_number("LOCAL_RANK", variables, 0),
                address=variables.get("MASTER_ADDR", "127.0.0.1"),
                port=_number("MASTER_PORT", variables, 29500),
            )
        # A batch script has these variables too, for one task; srun adds the step's.
        if "SLURM_STEP_ID" in variables and _number("SLURM_STEP_NUM_TASKS", variables, 1) > 1:
            return cls(
                rank=_number("SLURM_PROCID", variables),
                size=_number("SLURM_STEP_NUM_TASKS", variables),
                local_rank=_number("SLURM_LOCALID", variables),
                address=variables.get("MASTER_ADDR") or _first_host(variables),
                # Steps that run side by side must not meet: a port per job and step.
                port=_number("MASTER_PORT", variables, _step_port(variables)),
            )
        return None

    def __post_init__(self) -> None:
        """Refuse a rank outside the world."""
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size} processes: check RANK and WORLD_SIZE")

    @contextmanager
    def joined(self, device: str) -> Iterator[Ranks]:
        """Join the other processes, on the GPU of this rank ("cuda") or on the CPU ("cpu"); collective.

        A process that has joined them already stays in its group, and in it when the context ends.

        Raises:
            ValueError: this host has fewer GPUs than processes.
            JoinError: some processes did not come, or cannot talk to each other.
        """
        if device == "cuda":
            n_gpus = torch.cuda.device_count()
            # srun --gpus-per-task shows every process one GPU, its own. NCCL refuses one that is shared.
            index = 0 if n_gpus == 1 else self.local_rank
            if index >= n_gpus:
                raise ValueError(
                    f"process {self.local_rank} of this host has no GPU: torch sees {n_gpus}. Start one "
                    "process per GPU, or use the CPU"
                )
            torch.cuda.set_device(index)
            # Registered buffers of captured exchanges hang where torch's segments are expandable.
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        if dist.is_initialized():
            yield Ranks(dist.group.WORLD)
            return
        seconds = patience()
        store = meet(self.rank, self.size, self.address, self.port, seconds)
        gloo = device != "cuda"
        try:
            dist.init_process_group(
                "gloo" if gloo else "nccl",
                store=store,
                rank=self.rank,
                world_size=self.size,
                # gloo tries five times as long as it is told; NCCL connects when it is first used
                timeout=timedelta(seconds=seconds / 5) if gloo else None,
            )
        except RuntimeError as error:
            raise JoinError(
                f"rank {self.rank}: all {self.size} processes are here, but cannot connect to each other "
                f"within {seconds:g} s ({str(error).splitlines()[0][:200]}). Set GLOO_SOCKET_IFNAME "
                "(NCCL_SOCKET_IFNAME on GPUs) to the network interface that reaches the other hosts, or "
                f"{PATIENCE} to more seconds"
            ) from error
        if gloo:
            dist.distributed_c10d._set_pg_timeout(_COLLECTIVE)
        try:
            yield Ranks(dist.group.WORLD)
        finally:
            dist.destroy_process_group()


def _first_host(variables: Mapping[str, str]) -> str:
    if variables.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"  # whatever the host's name leads to
    return hosts(variables.get("SLURM_STEP_NODELIST", ""))[0]


def _step_port(variables: Mapping[str, str]) -> int:
    step = variables["SLURM_STEP_ID"]
    number = _number("SLURM_JOB_ID", variables) * 31 + (int(step) if step.isdigit() else 0)
    return 20_000 + number % 12_000  # below the ports that systems hand out themselves


def _number(name: str, variables: Mapping[str, str], default: int | None = None) -> int:
    """Return a variable as a number >= 0; without default it must be there."""
    value = variables.get(name, default)
    if not str(value).isdigit():
        raise ValueError(
            f"this process was started by torchrun or srun, but {name}={value!r} is not a number; start it "
            "by one of the two, or unset the variables that they set"
        )
    return int(str(value))
