import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch

from gnnmd.parallel import RankFailure, WorkerDied, Workers
from tests.parallel import jobs


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two workers for all tests that leave them alive."""
    with Workers(2) as workers:
        yield workers


@pytest.fixture
def doomed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Workers, list[int]]]:
    """Two workers and their processes, none of which is there when the test ends."""
    monkeypatch.setattr("gnnmd.parallel.workers.GRACE", 1.0)
    workers = Workers(2)
    pids = workers.call(jobs.process_id)
    yield workers, pids
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(WorkerDied, match="closed, or have died; start new ones"):
        workers.call(jobs.total, 1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_worker_answers_in_order(workers: Workers) -> None:
    pids = workers.call(jobs.process_id)
    assert len({*pids, os.getpid()}) == 3
    assert workers.call(jobs.total, 3) == [7, 7]


def test_data_arrives_as_it_was_sent(workers: Workers) -> None:
    big = torch.arange(10**6, dtype=torch.float64)
    for numbers, text, nothing in workers.call(jobs.echo, big, "x", None):
        assert torch.equal(numbers, big)
        assert (text, nothing) == ("x", None)


def test_threads_of_the_caller_take_turns(workers: Workers) -> None:
    with ThreadPoolExecutor(8) as threads:
        sums = list(threads.map(lambda x: workers.call(jobs.total, x), range(40)))
    assert sums == [[2 * x + 1] * 2 for x in range(40)]


def test_a_finalizer_in_the_middle_of_a_call_has_its_turn_after_it(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(pipes: list[Connection], timeout: float | None) -> list[object]:
        if not called:
            called.append(True)
            workers.call_soon(jobs.touch, tmp_path / "soon")
            assert not (tmp_path / "soon-0").exists()
        return wait(pipes, timeout)

    called: list[bool] = []
    monkeypatch.setattr("gnnmd.parallel.workers.wait", interrupted)
    assert workers.call(jobs.total, 3) == [7, 7]
    assert (tmp_path / "soon-1").exists()
    workers.call_soon(jobs.touch, tmp_path / "now")
    assert (tmp_path / "now-1").exists()
    workers.call_soon(jobs.fail_alike)
    assert workers.call(jobs.total, 3) == [7, 7]


def test_what_fails_on_all_alike_leaves_them_alive(workers: Workers) -> None:
    pids = workers.call(jobs.process_id)
    with pytest.raises(RankFailure, match="rank 0 of 2 failed while trying: ValueError: told") as raised:
        workers.call(jobs.fail_alike)
    assert "in fail_alike" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Awkward: not portable"):
        workers.call(jobs.fail_awkwardly)
    assert workers.call(jobs.process_id) == pids


def test_a_class_that_workers_cannot_import_is_an_error_with_a_remedy(workers: Workers) -> None:
    local = type("Mine", (), {})
    local.__module__, local.__qualname__ = "__main__", "Mine"
    sys.modules["__main__"].Mine = local  # as a class of a notebook
    try:
        with pytest.raises(ImportError, match=r"cannot import a class.*Mine.*into a module of its own"):
            workers.call(jobs.echo, local())
    finally:
        del sys.modules["__main__"].Mine
    assert workers.call(jobs.total, 0) == [1, 1]


def test_a_forked_child_neither_uses_nor_ends_the_workers(workers: Workers) -> None:
    child = os.fork()
    if not child:
        try:
            workers.close()
            workers.call(jobs.total, 0)
        except RuntimeError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert workers.call(jobs.total, 0) == [1, 1]


def test_what_fails_on_one_ends_all_that_wait_for_it(doomed: tuple[Workers, list[int]]) -> None:
    with pytest.raises(ValueError, match="rank 1 is told to fail") as raised:
        doomed[0].call(jobs.fail, 1)
    assert "on worker 1 of 2" in raised.value.__notes__[0]
    assert "in fail" in raised.value.__notes__[0]
    assert "so they were ended" in raised.value.__notes__[1]


def test_death_of_a_worker_in_the_middle_of_a_call(doomed: tuple[Workers, list[int]]) -> None:
    with pytest.raises(WorkerDied, match=r"worker 1 of 2 died \(signal 9\).*too little memory"):
        doomed[0].call(jobs.die, 1)


def test_death_of_a_worker_between_calls(doomed: tuple[Workers, list[int]]) -> None:
    workers, pids = doomed
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"worker 0 of 2 died \(signal 9\)"):
        workers.call(jobs.total, 1)


def test_interrupt_in_the_middle_of_a_call(doomed: tuple[Workers, list[int]]) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        doomed[0].call(jobs.rest, 60.0)
    assert time.monotonic() - before < 5.0


def test_numbers_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="workers=0: at least one process"):
        Workers(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="workers=3 needs as many GPUs, but torch sees 2; use fewer workers"):
        Workers(3, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to join on")
def test_workers_that_cannot_join_say_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # here, not in the worker
    with Workers(1, "cuda") as workers:
        with pytest.raises(ValueError, match="process 0 of this host has no GPU: torch sees 0"):
            workers.call(jobs.total, 1)
        with pytest.raises(WorkerDied, match="exit code 1"):
            workers.call(jobs.total, 1)


KILLED = """
import sys
from gnnmd.parallel import Workers
from tests.parallel import jobs
workers = Workers(2)
print(*workers.call(jobs.process_id), flush=True)
workers.call(jobs.rest, 600.0)
"""


def test_a_killed_caller_leaves_no_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its workers wait in a collective. The script has no ``__main__`` guard."""
    (tmp_path / "script.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [sys.executable, tmp_path / "script.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as caller:
        assert caller.stdout is not None
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        time.sleep(0.2)
        caller.kill()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
