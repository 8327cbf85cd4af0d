"""How processes that were started together meet, and what is said when some of them do not come."""

import itertools
import os
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

#: Seconds that processes wait for each other, unless the variable of this name says otherwise.
PATIENCE = "GNNMD_JOIN_TIMEOUT"
_PATIENCE = 300.0
#: The first process decides; the others hear of it so much later at most.
_GRACE = 15.0
_FINE = "all are here"
_meetings = itertools.count()


class JoinError(RuntimeError):
    """Processes that were started together did not find each other; the message says who is missing."""


def patience(variables: Mapping[str, str] = os.environ) -> float:
    """Return how long to wait for the others, in seconds.

    Raises:
        ValueError: the variable is not a positive number.
    """
    text = variables.get(PATIENCE, str(_PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{PATIENCE}={text!r}: give the seconds to wait for other processes, e.g. 300")
    return seconds


def meet(rank: int, size: int, address: str, port: int, seconds: float) -> dist.Store:
    """Wait until all processes are here; collective.

    Where they are on several hosts, gloo is told the network interface that reaches the first process: by
    itself it takes that of the host's name, which is often the loopback.

    Args:
        rank: of this process.
        size: number of processes.
        address: host of rank 0.
        port: where rank 0 serves, or torchrun already does.
        seconds: how long to wait.

    Returns:
        A store that all of them share.

    Raises:
        JoinError: some did not come; names their ranks and, where Slurm says so, their hosts.
    """
    deadline = time.monotonic() + seconds
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, or by `Workers`
    if rank == 0 and not served:
        store, way = _serve(port, size), ("", "")
    else:
        way = _reach(address, port, rank, deadline, seconds)
        store = dist.TCPStore(
            address, port, size, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = dist.PrefixStore(f"gnnmd/{attempt}/{next(_meetings)}", store)
    shared.set(f"arrived/{rank}", " ".join([socket.gethostname(), *way]))
    verdict = _judge(shared, size, deadline, seconds) if rank == 0 else _hear(shared, rank, address, deadline)
    if verdict != _FINE:
        raise JoinError(verdict)
    _choose_interface(rank, [shared.get(f"arrived/{r}").decode() for r in range(size)])
    return shared


def hosts(nodes: str) -> list[str]:
    """Return the hosts of a Slurm list: ``node[03-05,9],other`` -> node03, node04, node05, node9, other.

    Raises:
        ValueError: no host in it.
    """
    found = []
    for name in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", nodes):
        pieces = [
            [number for part in piece[1:-1].split(",") for number in _numbers(part)]
            if piece.startswith("[")
            else [piece]
            for piece in re.findall(r"\[[^\]]*\]|[^\[]+", name)
        ]
        found += ["".join(choice) for choice in itertools.product(*pieces)]
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR to that of rank 0")
    return found


def _numbers(part: str) -> list[str]:
    """Return 03, 04, 05 of ``03-05``."""
    first, _, last = part.partition("-")
    return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)] if last else [first]


def _serve(port: int, size: int) -> dist.TCPStore:
    try:
        # multi_tenant: a process that meets the others once more finds the server of its first meeting.
        return dist.TCPStore(
            "127.0.0.1", port, size, is_master=True, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise JoinError(
            f"port {port} of {socket.gethostname()}, where the processes are to meet, cannot be used "
            f"({str(error).splitlines()[0]}): set MASTER_PORT to a free one, the same for all of them"
        ) from error


def _reach(address: str, port: int, rank: int, deadline: float, seconds: float) -> tuple[str, str]:
    """Wait for the first process; return the address of this host on the way there, and of that one."""
    # TCPStore would try too, but writes stack traces while it waits.
    while True:
        try:
            with socket.create_connection((address, port), timeout=5.0) as connection:
                return connection.getsockname()[0], connection.getpeername()[0]
        except OSError as error:
            if time.monotonic() > deadline:
                raise JoinError(
                    f"rank {rank} on {socket.gethostname()} did not reach the first process at "
                    f"{address}:{port} within {seconds:g} s ({error}). Either it did not start there (see "
                    "its log), or the network between them is closed: set MASTER_ADDR to another name or "
                    f"address of that host, MASTER_PORT to an open port, or {PATIENCE} to more seconds"
                ) from None
        time.sleep(0.2)


def _judge(store: dist.Store, size: int, deadline: float, seconds: float) -> str:
    """Tell the others whether all came; if not, stay until those who are here have heard it."""
    missing = _wait_for_all([f"arrived/{rank}" for rank in range(size)], store, deadline)
    verdict = _complaint(store, missing, size, seconds) if missing else _FINE
    store.set("verdict", verdict)
    if missing:
        heard = [f"heard/{rank}" for rank in range(1, size) if rank not in missing]
        _wait_for_all(heard, store, time.monotonic() + _GRACE)
    return verdict


def _hear(store: dist.Store, rank: int, address: str, deadline: float) -> str:
    try:
        store.wait(["verdict"], timedelta(seconds=max(deadline - time.monotonic(), 0) + _GRACE))
        verdict = store.get("verdict").decode()
        store.set(f"heard/{rank}", "")
    except RuntimeError as error:
        raise JoinError(
            f"rank {rank}: the first process, on {address}, was reached, but then ended: see its log"
        ) from error
    return verdict


def _wait_for_all(keys: Sequence[str], store: dist.Store, deadline: float) -> list[int]:
    """Return the places of the keys that nobody has set."""
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return [i for i, key in enumerate(keys) if not store.check([key])]
        time.sleep(0.1)
    return []


def _complaint(store: dist.Store, missing: Sequence[int], size: int, seconds: float) -> str:
    here = sorted(set(range(size)) - set(missing))
    came = {rank: store.get(f"arrived/{rank}").decode().split()[0] for rank in here}
    expected = _slurm_hosts(os.environ)
    absent = sorted({expected[rank] for rank in missing if rank in expected} - set(came.values()))
    of = f" of {', '.join(absent)}" if absent else ""
    return (
        f"{len(missing)} of {size} processes did not come within {seconds:g} s: rank {_ranges(missing)}{of}; "
        f"here are rank {_ranges(here)} on {', '.join(sorted(set(came.values())))}. Look into the logs of "
        "the missing ones; leave a broken host out (sbatch --exclude), or wait longer with "
        f"{PATIENCE}=<seconds>"
    )


def _slurm_hosts(variables: Mapping[str, str]) -> dict[int, str]:
    """Return the host of every rank, as Slurm deals them out in blocks; nothing if srun did not start us."""
    nodes, counts = (variables.get(f"SLURM_STEP_{name}", "") for name in ("NODELIST", "TASKS_PER_NODE"))
    if not nodes or not counts:
        return {}
    per_host = [
        int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))
    ]
    return dict(enumerate(h for h, n in zip(hosts(nodes), per_host, strict=False) for _ in range(n)))


def _ranges(ranks: Sequence[int]) -> str:
    """Return ``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _choose_interface(rank: int, arrived: Sequence[str]) -> None:
    """Tell gloo the interface of this host on the way to the first process, if there is another host."""
    said = [line.split() for line in arrived]
    if len({words[0] for words in said}) == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    mine = said[rank][1:2]
    if said[rank][0] == said[0][0]:  # ranks beside the first one: by which address others know this host
        mine = [words[2] for words in said if words[0] != said[0][0] and len(words) > 2]
    if mine and (name := _interface(mine[0].removeprefix("::ffff:"))):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface(address: str) -> str | None:
    """Return the network interface that has an IPv4 address."""
    import fcntl  # not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR of netdevice(7): struct ifreq holds the name, then a sockaddr_in.
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))
            except OSError:  # without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
