import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from gnnmd.parallel.rendezvous import JoinError, hosts, meet, patience

JOINING = """
import sys, torch, torch.distributed
from gnnmd.parallel import World
from gnnmd.parallel.rendezvous import JoinError
world = World.from_environment()
try:
    for _ in range(2):  # processes that part can meet again
        with world.joined("cpu") as ranks:
            print("sum", int(ranks.sum(torch.tensor(ranks.rank + 1))))
except JoinError as error:
    print(error)
    sys.exit(1)
"""
SRUN = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(rank: int, *before: str, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **SRUN, "SLURM_PROCID": str(rank)}
    return subprocess.Popen(
        [*before, sys.executable, "-c", JOINING],
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def said(*processes: "subprocess.Popen[str]") -> list[str]:
    return [process.communicate(timeout=60)[0] for process in processes]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("node1", ["node1"]),
        ("node1,node2", ["node1", "node2"]),
        ("gpu[09-11,3],login1", ["gpu09", "gpu10", "gpu11", "gpu3", "login1"]),
        ("rack[1-2]n[08-09],x", ["rack1n08", "rack1n09", "rack2n08", "rack2n09", "x"]),
        ("a-b-c.example.org", ["a-b-c.example.org"]),
    ],
)
def test_hosts_of_a_list(nodes: str, expected: list[str]) -> None:
    assert hosts(nodes) == expected


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_patience_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"GNNMD_JOIN_TIMEOUT='{text}': give the seconds"):
        patience({"GNNMD_JOIN_TIMEOUT": text})


def test_who_does_not_come_is_named_with_its_host() -> None:
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "GNNMD_JOIN_TIMEOUT": "3"}
    began = time.monotonic()
    answers = said(*(start(rank, **variables) for rank in (0, 1)))
    assert time.monotonic() - began < 30
    for answer in answers:
        assert "1 of 3 processes did not come within 3 s: rank 2 of n2" in answer
        assert f"here are rank 0-1 on {socket.gethostname()}" in answer


def test_a_first_process_that_does_not_start_is_named_with_its_address() -> None:
    port = free_port()
    with pytest.raises(JoinError, match=rf"rank 1 on .* did not reach the first process at 127.0.0.1:{port}"):
        meet(1, 2, "127.0.0.1", port, 0.3)


def test_a_host_without_address_is_named() -> None:
    with pytest.raises(JoinError, match=r"at host.invalid:1 within 0.1 s \(.*\).*set MASTER_ADDR"):
        meet(1, 2, "host.invalid", 1, 0.1)


def test_a_port_that_is_taken_is_named() -> None:
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(JoinError, match="set MASTER_PORT to a free one"),
    ):
        meet(0, 1, "localhost", taken.getsockname()[1], 1.0)


# Two hosts of one machine: network namespaces with names of their own, joined by a bridge.
HOSTS = ("gnnmda", "gnnmdb")


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """Return the command that runs something on each; their own names lead to the loopback, as on Debian."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    folder = tmp_path_factory.mktemp("hosts")
    try:
        ip("link add gnnmdbr type bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel makes no network namespaces: {error.stderr.decode().strip()}")
    on = {}
    try:
        ip("link set gnnmdbr up")
        for n, name in enumerate(HOSTS, start=1):
            ip(f"netns add {name}")
            ip(f"link add {name}0 type veth peer name fabric0 netns {name}")
            ip(f"link set {name}0 master gnnmdbr up")
            for line in ("link set lo up", f"addr add 10.213.0.{n}/24 dev fabric0", "link set fabric0 up"):
                ip(f"-n {name} {line}")
            others = "".join(f"10.213.0.{m} {o}\n" for m, o in enumerate(HOSTS, start=1) if o != name)
            file = folder / f"hosts.{name}"
            file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
            script = folder / name
            script.write_text(f'#!/bin/sh\nmount --bind {file} /etc/hosts\nhostname {name}\nexec "$@"\n')
            script.chmod(0o755)
            on[name] = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", str(script)]
        yield on
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", "gnnmdbr"], check=False, capture_output=True)


def test_hosts_meet_though_their_names_lead_to_the_loopback(two_hosts: dict[str, list[str]]) -> None:
    here, there = two_hosts.values()
    variables = {"SLURM_STEP_NODELIST": ",".join(HOSTS), "GNNMD_JOIN_TIMEOUT": "20"}
    answers = said(*(start(rank, *on, **variables) for rank, on in enumerate((here, here, there))))
    assert answers == ["sum 6\nsum 6\n"] * 3


def test_a_wrong_interface_ends_with_advice(two_hosts: dict[str, list[str]]) -> None:
    here, there = two_hosts.values()
    variables = {
        "SLURM_STEP_NODELIST": ",".join(HOSTS),
        "SLURM_STEP_NUM_TASKS": "2",
        "GNNMD_JOIN_TIMEOUT": "4",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    answers = said(start(0, *here, **variables), start(1, *there, **variables))
    assert any("all 2 processes are here, but cannot connect" in answer for answer in answers)
    assert any("Set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs)" in answer for answer in answers)


def test_a_network_that_is_down_is_told_from_a_process_that_is_late(two_hosts: dict[str, list[str]]) -> None:
    here, there = two_hosts.values()
    variables = {
        "SLURM_STEP_NODELIST": ",".join(HOSTS),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "GNNMD_JOIN_TIMEOUT": "3",
    }
    ip(f"link set {HOSTS[1]}0 down")
    try:
        first, second = said(start(0, *here, **variables), start(1, *there, **variables))
    finally:
        ip(f"link set {HOSTS[1]}0 up")
    assert f"rank 1 of {HOSTS[1]}" in first
    assert f"did not reach the first process at {HOSTS[0]}:" in second
