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


def main() -> None:
    """Join the other workers, then answer one call after the other until the caller goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    connection = Connection(int(os.environ.pop("GNNMD_PIPE")))
    device, threads = os.environ.pop("GNNMD_DEVICE"), int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    calls: SimpleQueue[bytes] = SimpleQueue()
    # Reads while the worker computes, so that the caller's death ends it in the middle of a collective too.
    threading.Thread(target=_receive, args=(connection, calls), daemon=True).start()
    world = World.from_environment()
    assert world is not None
    with world.joined(device) as ranks:
        while True:
            connection.send_bytes(_answer(ranks, calls.get()))


def _receive(connection: Connection, calls: "SimpleQueue[bytes]") -> None:
    try:
        while True:
            calls.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)  # leaving the process group in order would wait for workers that are gone already


def _answer(ranks: Ranks, call: bytes) -> bytes:
    """Return (True, result, "") or (False, exception, traceback), pickled."""
    try:
        module, name, args = pickle.loads(call)
        function = getattr(importlib.import_module(module), name)
        return pickle.dumps((True, function(ranks, *args), ""))
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        try:
            answer = pickle.dumps((False, error, text))
            pickle.loads(answer)  # an exception with arguments of its own may fail here, not at the caller
        except Exception:
            answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text))
        return answer


if __name__ == "__main__":
    main()
