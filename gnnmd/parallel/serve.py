"""A worker process of `gnnmd.parallel.workers`, which runs it as ``python -m gnnmd.parallel.serve``."""

import importlib
import os
import pickle
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.world import World

#: How often a worker looks whether its caller still lives. Seconds.
WATCH = 1.0


def main() -> None:
    """Join the other workers, then answer one call after the other until the caller goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    connection = Connection(int(os.environ.pop("GNNMD_PIPE")))
    caller = int(os.environ.pop("GNNMD_CALLER"))
    device, threads = os.environ.pop("GNNMD_DEVICE"), int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    calls: SimpleQueue[bytes] = SimpleQueue()
    # Reads while the worker computes, so that the caller's death ends it in the middle of a collective too.
    threading.Thread(target=_receive, args=(connection, calls, caller), daemon=True).start()
    try:
        world = World.from_environment()
        assert world is not None
        with world.joined(device) as ranks:
            while True:
                connection.send_bytes(_answer(ranks, calls.get()))
    except Exception as error:  # it could not join: that answers the first call
        connection.send_bytes(_failure(error))
        raise


def _receive(connection: Connection, calls: "SimpleQueue[bytes]", caller: int) -> None:
    try:
        while True:
            # Processes that the caller forked may hold its end of the pipe open after its death.
            while not connection.poll(WATCH):
                if os.getppid() != caller:
                    os._exit(0)
            calls.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)  # leaving the process group in order would wait for workers that are gone already


def _answer(ranks: Ranks, call: bytes) -> bytes:
    """Return (True, result, "") or (False, exception, traceback), pickled."""
    try:
        module, name, packed = pickle.loads(call)
        function = getattr(importlib.import_module(module), name)
        return pickle.dumps((True, function(ranks, *_unpacked(packed)), ""))
    except Exception as error:
        return _failure(error)


def _unpacked(packed: bytes) -> tuple[object, ...]:
    try:
        args: tuple[object, ...] = pickle.loads(packed)
    except (AttributeError, ImportError) as error:
        raise ImportError(
            f"workers cannot import a class of what they were sent ({error}). Move it from the script or "
            "notebook into a module of its own and import it from there"
        ) from error
    return args


def _failure(error: Exception) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        answer = pickle.dumps((False, error, text))
        pickle.loads(answer)  # an exception with arguments of its own may fail here, not at the caller
    except Exception:
        answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text))
    return answer


if __name__ == "__main__":
    main()
