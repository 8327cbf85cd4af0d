"""Questions to Slurm, by its own commands: what it has, who may use it, how a job is."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from gnnmd.parallel.settings import LaunchConfig
from gnnmd.units import seconds

#: Seconds after which a question is given up.
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Partition:
    """What a partition has.

    Attributes:
        default: taken by jobs that name none.
        up: takes jobs.
        nodes: hosts.
        gpus: most GPUs of a host.
        limit: longest duration in seconds; None is unlimited.
    """

    default: bool
    up: bool
    nodes: int
    gpus: int
    limit: int | None


def check(launch: LaunchConfig) -> None:
    """Refuse what Slurm cannot give, before anything is queued.

    Raises:
        ValueError: no Slurm here, no such partition or account, more nodes, GPUs or time than there are.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm, but there is no sbatch here: log in to the cluster, or use launch=local"
        )
    known = partitions()
    defaults = [name for name, partition in known.items() if partition.default]
    name = launch.partition or (defaults[0] if defaults else None)
    if name is None:
        raise ValueError(f"this cluster has no default partition: set launch.partition to {_either(known)}")
    unknown = [part for part in name.split(",") if part not in known]
    if unknown:
        raise ValueError(f"launch.partition={unknown[0]}: no such partition; there are {', '.join(known)}")
    chosen = [known[part] for part in name.split(",")]
    if not any(partition.up for partition in chosen):
        raise ValueError(f"partition {name} is down (sinfo -p {name}): set launch.partition to another one")
    if launch.nodes > (most := max(partition.nodes for partition in chosen)):
        raise ValueError(f"launch.nodes={launch.nodes}, but partition {name} has {most}: take fewer")
    if launch.gpus_per_node > (most := max(partition.gpus for partition in chosen)):
        remedy = (
            f"take {most} at most" if most else "set launch.gpus_per_node=0, or launch.partition to one with"
        )
        raise ValueError(
            f"launch.gpus_per_node={launch.gpus_per_node}, but the nodes of partition {name} have "
            f"{most or 'no'} GPUs: {remedy}"
        )
    limits = [partition.limit for partition in chosen]
    if None not in limits and seconds(launch.time) > (longest := max(t for t in limits if t is not None)):
        raise ValueError(
            f"launch.time={launch.time} is more than partition {name} allows, {duration(longest)}: set "
            "launch.time to that; the run is queued again until it is done"
        )
    mine = accounts()
    if launch.account is not None and mine and launch.account not in mine:
        raise ValueError(f"launch.account={launch.account} is not one of yours: {', '.join(sorted(mine))}")


def partitions() -> dict[str, Partition]:
    """Return the partitions of this cluster.

    Raises:
        ValueError: Slurm does not answer.
    """
    done = _run("sinfo", "--noheader", "--all", "--format=%P|%a|%D|%G|%l")
    if done.returncode:
        raise ValueError(f"Slurm does not answer sinfo ({_last_line(done)}): try again, or use launch=local")
    found: dict[str, Partition] = {}
    for line in done.stdout.splitlines():
        name, state, nodes, gres, limit = line.split("|")
        default, name = name.endswith("*"), name.removesuffix("*")
        gpus = sum(int(n) for n in re.findall(r"gpu:(?:[^,:(]+:)?(\d+)", gres))
        before = found.get(name)
        found[name] = Partition(
            default,
            state == "up",
            int(nodes) + (before.nodes if before else 0),
            max(gpus, before.gpus if before else 0),
            _limit(limit),
        )
    return found


def accounts() -> set[str]:
    """Return the accounts of this user; empty where Slurm keeps none."""
    if shutil.which("sacctmgr") is None:
        return set()
    user = getpass.getuser()
    done = _run("sacctmgr", "-nP", "show", "associations", f"user={user}", "format=account")
    return {line for line in done.stdout.splitlines() if line} if done.returncode == 0 else set()


def job_state(job: str) -> str:
    """Return the state of a job (PENDING, RUNNING, COMPLETED, ...), with or without accounting.

    The controller is asked first: it forgets jobs some minutes after their end, the accounts do not. UNKNOWN
    is the answer where neither knows it.
    """
    done = _run("scontrol", "show", "job", "--oneliner", job)
    if done.returncode == 0 and (found := re.search(r"\bJobState=(\w+)", done.stdout)):
        return found[1]
    if shutil.which("sacct") is not None:
        done = _run("sacct", "-nXP", "-j", job, "--format=State")
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return "UNKNOWN"


def requeue(job: str) -> None:
    """Put a running job back into the queue; Slurm ends its processes.

    Raises:
        RuntimeError: Slurm refuses.
    """
    done = _run("scontrol", "requeue", job)
    if done.returncode:
        raise RuntimeError(f"Slurm does not queue job {job} again: {_last_line(done)}")


def duration(time: int) -> str:
    """Return ``1:06:30:00`` for seconds, as `seconds` reads it."""
    days, rest = divmod(time, 86_400)
    clock = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}:{clock}" if days else clock


def _limit(text: str) -> int | None:
    """Return the seconds of sinfo's ``2-00:00:00``, ``30:00`` or ``infinite``."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _either(names: Sequence[str] | dict[str, Partition]) -> str:
    return " or ".join(names)


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
