"""One set of gloo processes for all distributed tests of a session.

A test sends a function by its module path: ``pool.run(4, function, *args)`` calls ``function(group, *args)``
in four processes, with one process group over them, and returns what each of them returned.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

#: After one rank failed, the others get this long to answer before they are ended, s.
GRACE = 3.0
#: What a collective waits for its peers, s: longer than any test, so that the pool decides.
COLLECTIVE_TIMEOUT = 120.0


class RankError(Exception):
    """One or several ranks failed; shows the traceback of each."""


class WorkerPool:
    """Processes that stay up between tests; started by the first test that needs them.

    Args:
        backend: "gloo", or "nccl" with one GPU per rank.
        sizes: numbers of ranks that may be asked for; each has a process group of its own, made once.
    """

    def __init__(self, backend: str = "gloo", sizes: Sequence[int] = (1, 2, 3, 4, 5, 6, 8)) -> None:
        self._backend, self._sizes = backend, tuple(sizes)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Call ``function(group, *args)`` on ranks 0 .. size-1 and return their results in order.

        Raises:
            RankError: a rank raised, died or did not answer within ``timeout`` seconds; no process is left
                hanging.
        """
        if not self._processes:
            self._start(max(self._sizes))
        job = pickle.dumps((size, function.__module__, function.__qualname__, args))
        for pipe in self._pipes[:size]:
            pipe.send_bytes(job)
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        missing = set(range(size))
        while missing and time.monotonic() < deadline:
            ready = wait([self._pipes[r] for r in missing], deadline - time.monotonic())
            for rank in [r for r in missing if self._pipes[r] in ready]:
                missing.remove(rank)
                try:
                    ok, answer = pickle.loads(self._pipes[rank].recv_bytes())
                except EOFError:
                    ok, answer = False, "the process died"
                if ok:
                    answers[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in missing:
            failures[rank] = "no answer: it waits for another rank, or is slow"
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)  # prints where it hangs
        if missing or "the process died" in failures.values():
            time.sleep(0.2)
            self.close()
        if failures:
            raise RankError("\n".join(f"--- rank {r} of {size}: {failures[r]}" for r in sorted(failures)))
        return [answers[rank] for rank in range(size)]

    def _start(self, size: int) -> None:
        if self._backend == "nccl":
            context: Any = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        else:
            # The fork server imports torch once; its children start in milliseconds and share the pages.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch.distributed", "gnnmd.training.run", "ase"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self._backend, self._sizes, self._store.port, theirs, sys.path),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            process.close()
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(
    rank: int, backend: str, sizes: tuple[int, ...], port: int, pipe: Connection, path: list[str]
) -> None:
    """Answer jobs until the pipe closes."""
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=max(sizes), timeout=timeout)
    groups = {size: dist.new_group(range(size)) for size in sizes}
    while True:
        try:
            size, module, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)  # destroying the groups would wait for ranks that are already gone
        try:
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = pickle.dumps((True, function(groups[size], *args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
