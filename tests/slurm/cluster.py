"""A real Slurm on this machine, without systemd: controller, two nodes and munge, all in one folder.

``python -m tests.slurm.cluster COMMAND ...`` runs a command in it. Debian's packages are installed if they
are missing; the daemons end with the context, whatever happens in it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")

#: Two nodes that are this machine. Their GPUs exist on paper. No cgroups, so that it runs in containers.
CONFIG = """
ClusterName=gnnmd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=20
MinJobAge=600
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=01:00:00 OverSubscribe=YES:2
PartitionName=down Nodes=n[1-2] State=DOWN
"""


class Unavailable(Exception):
    """Slurm cannot run here; the message says why."""


@contextmanager
def cluster() -> Iterator[Path]:
    """Start Slurm; commands find it by the variable SLURM_CONF, which is set here.

    Raises:
        Unavailable: not root, or the packages cannot be installed.
    """
    _install()
    folder = Path(tempfile.mkdtemp(prefix="gnnmd-slurm-"))
    folder.chmod(0o755)  # munged looks at the folders above its socket
    before = os.environ.get("SLURM_CONF")
    try:
        _start(folder)
        yield folder
    finally:
        _stop(folder)
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before


def _install() -> None:
    if os.geteuid() != 0:
        raise Unavailable("Slurm's daemons need root")
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        return
    if not shutil.which("apt-get"):
        raise Unavailable("there is no Slurm, and no apt to install it")
    # Maintainer scripts start daemons unless this file forbids it.
    policy = Path("/usr/sbin/policy-rc.d")
    if not policy.exists():
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for before in ([], ["apt-get", "update"]):
        if before:
            subprocess.run(before, env=environment, capture_output=True, check=False)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise Unavailable(f"apt cannot install {', '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")


def _start(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = _free_ports(3)
    config = CONFIG.format(
        folder=folder, host=socket.gethostname().split(".")[0], port=ports[0], first=ports[1], last=ports[2]
    )
    (folder / "slurm.conf").write_text(config)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = {
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "seed",
    }
    options = [f"--{option}={folder}/{name}" for option, name in files.items()]
    _run("munged", "--force", "--num-threads=1", f"--key-file={key}", *options)  # as root: the files are its
    _run("slurmctld", "-c")
    for node in ("n1", "n2"):
        _run("slurmd", "-N", node)
    deadline = time.monotonic() + 30
    while _run("sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D").strip() != "2":
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm's nodes do not come up:\n{(folder / 'slurmctld.log').read_text()}")
        time.sleep(0.2)


def _stop(folder: Path) -> None:
    for how in (["--signal=KILL"], []):
        subprocess.run(["scancel", "--user=root", *how], capture_output=True, check=False, timeout=20)
    for name in ("n1", "n2", "slurmctld", "munged"):
        with suppress(OSError, ValueError):
            os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (left := _children(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _children(folder: Path) -> list[int]:
    """Return the daemons of this Slurm, and the processes of its jobs."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _free_ports(n: int) -> list[int]:
    """Return n successive ports that nobody listens at."""
    for first in range(16_800, 19_000, n):
        with suppress(OSError):
            for port in range(first, first + n):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return list(range(first, first + n))
    raise Unavailable("there are no free ports")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr or done.stdout}")
    return done.stdout


if __name__ == "__main__":
    try:
        with cluster():
            sys.exit(subprocess.run(sys.argv[1:] or ["bash"], check=False).returncode)
    except Unavailable as reason:
        sys.exit(f"no Slurm here: {reason}")
