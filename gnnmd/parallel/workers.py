"""Processes on this machine that share one process group and run functions together.

They are new interpreters that import gnnmd, not copies of the caller: scripts need no ``__main__`` guard, and
notebooks work. Calls and answers are pickled messages through pipes that nobody else can open.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

#: After a worker has failed, the others get so long to answer: they may wait for it in a collective. Seconds.
GRACE = 5.0


class WorkerDied(RuntimeError):
    """A worker process ended by itself: killed, out of memory, crashed; or the workers are closed."""


class Workers:
    """Processes that form one group; a context manager. They end with the object and with its process.

    Args:
        n: number of processes.
        device: "cuda" gives each a GPU of its own, "cpu" divides the cores among them.

    Raises:
        ValueError: n < 1, or fewer GPUs than processes.
    """

    def __init__(self, n: int, device: str = "cpu") -> None:
        if n < 1:
            raise ValueError(f"workers={n}: at least one process is needed")
        if device == "cuda" and n > torch.cuda.device_count():
            raise ValueError(
                f"workers={n} needs as many GPUs, but torch sees {torch.cuda.device_count()}; use fewer "
                "workers, or device='cpu'"
            )
        # The server of the workers' rendezvous lives here: its port is free by construction.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()  # calls of `call_soon`
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._processes, self._pipes, self._owner)
        shared = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun: no rank starts a server of its own
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // n)),
            "GNNMD_DEVICE": device,
            "GNNMD_CALLER": str(self._owner),
        }
        # -P: PYTHONPATH says all; a random.py in the current folder must not be imported by surprise.
        command = [sys.executable, "-P", "-m", "gnnmd.parallel.serve"]
        for rank in range(n):
            ours, theirs = Pipe()
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GNNMD_PIPE": str(theirs.fileno())}
            self._pipes.append(ours)
            with theirs:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **shared, **own},
                        stdin=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                        process_group=0,  # the terminal's Ctrl-C is for the caller alone
                    )
                )

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(ranks, *args)`` on every worker; return the results in the workers' order.

        Args:
            function: a function of an importable module, not of a script or notebook.
            *args: sent to every worker.

        Raises:
            WorkerDied: a worker is gone; the others are ended too.
            Exception: what a worker raised, its traceback added as a note. If all raised the same, they go on
                living; otherwise one may wait for another, now or on its GPU, and all are ended.
        """
        message = self._message(function, args)
        try:
            with self._lock:  # threads take turns: two calls in different orders would never meet
                return self._run(message)
        finally:
            self._catch_up()

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Do so without an answer, now or after the call that is under way.

        For finalizers, which come at any time, on a thread that is in the middle of a call too.
        """
        self._waiting.append(self._message(function, args))
        self._catch_up()

    def send_signal(self, number: int) -> None:
        """Send a signal to every process, for example while a call is under way in another thread."""
        for process in list(self._processes):
            process.send_signal(number)

    def close(self) -> None:
        """End the processes; at once if they are idle or wait for each other."""
        _end(self._processes, self._pipes, self._owner)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _message(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"the workers belong to process {self._owner}; this one, forked from it, needs its own"
            )
        return pickle.dumps((function.__module__, function.__qualname__, pickle.dumps(args, 5)), 5)

    def _run(self, message: bytes) -> list[Any]:
        """Run what a message says on every worker; see `call`."""
        if not self._pipes:
            raise WorkerDied("the workers are closed, or have died; start new ones")
        try:
            for pipe in self._pipes:
                with suppress(OSError):  # a dead worker shows when its answer is read
                    pipe.send_bytes(message)
            results, failures = self._answers()
        except BaseException:  # Ctrl-C in the middle of a call: nobody knows what the workers hold
            self.close()
            raise
        if not failures:
            return [results[rank] for rank in sorted(results)]
        # The first that died explains why others complain about their connections.
        first = next((e for e in failures.values() if isinstance(e, WorkerDied)), min(failures.items())[1])
        alike = len(failures) == len(self._pipes) and len({(type(e), str(e)) for e in failures.values()}) == 1
        if isinstance(first, WorkerDied) or not alike:
            first.add_note("not all workers failed alike, so they were ended; start new ones")
            self.close()
        raise first

    def _catch_up(self) -> None:
        """Make the calls that wait, unless another one is under way: after that they are made."""
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                with suppress(Exception):  # nobody listens; if it ended the workers, the next call says so
                    self._run(self._waiting.popleft())
            finally:
                self._lock.release()

    def _answers(self) -> tuple[dict[int, Any], dict[int, Exception]]:
        """Return what each rank answered, or how it failed; ranks that do not answer are missing."""
        results: dict[int, Any] = {}
        failures: dict[int, Exception] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting and not any(isinstance(e, WorkerDied) for e in failures.values()):
            ready = wait(list(waiting.values()), GRACE if failures else None)
            if not ready:
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                pipe = waiting.pop(rank)
                try:
                    good, answer, text = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    failures[rank] = WorkerDied(self._obituary(rank))
                    continue
                if good:
                    results[rank] = answer
                else:
                    answer.add_note(f"on worker {rank} of {len(self._pipes)}:\n{text}")
                    failures[rank] = answer
        return results, failures

    def _obituary(self, rank: int) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(1.0)
        code = self._processes[rank].returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = ". Signal 9 is usually the system's answer to too little memory" if code == -9 else ""
        who = f"worker {rank} of {len(self._processes)}"
        return f"{who} died ({how}); its last words are on standard error{hint}"


def _end(processes: list[subprocess.Popen[bytes]], pipes: list[Connection], owner: int) -> None:
    """End processes and forget them; does nothing in a process that was forked from the owner."""
    if os.getpid() != owner:
        return
    while pipes:
        pipes.pop().close()  # which they notice
    deadline = time.monotonic() + 2.0
    while processes:
        process = processes.pop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()
