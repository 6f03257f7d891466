"""Processes of a gloo group on this machine: each runs a function and hands back its result.

They are forked from a server that has imported torch and done nothing else. A process forked from a test may hang: it
has the locks of all threads of the test's process, and none of the threads.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

PATIENCE_S = 300
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed", "geoaccel.cli", "geoaccel.models", "geoaccel.merging"])


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
        code: Exit code; negative: the signal.
        result: What its function returned; None where it did not.
        said: On stderr.
        seconds: After the start of all.
    """

    code: int
    result: Any
    said: str
    seconds: float


def in_processes(size: int, work: Callable[[int], Any], folder: Path, *, launched: bool = False) -> list[Ended]:
    """Run ``work(rank)`` in so many processes.

    Args:
        size: How many.
        work: What each does; a ``ValueError`` is exit code 2.
        folder: Where they leave what they say.
        launched: The environment is that of ``torchrun``, and ``work`` makes the group and returns its exit code;
            otherwise there is a default group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # torchrun keeps the store itself; without it rank 0 does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if launched else None
    port = store.port if store is not None else _free_port()
    sent = cloudpickle.dumps(work)
    began = time.monotonic()
    processes = [
        SERVER.Process(target=_child, args=(rank, size, port, sent, folder, launched), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    ended: dict[int, Ended] = {}
    while len(ended) < size:
        if time.monotonic() - began > PATIENCE_S + 10:  # they have said where they hang
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                file, said = folder / f"{rank}.pickle", (folder / f"{rank}.txt").read_text()
                result = pickle.loads(file.read_bytes()) if file.exists() else None
                ended[rank] = Ended(process.exitcode, result, said, time.monotonic() - began)
        time.sleep(0.05)
    return [ended[rank] for rank in range(size)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(rank: int, size: int, port: int, sent: bytes, folder: Path, launched: bool) -> None:
    code = 1
    with open(folder / f"{rank}.txt", "w", buffering=1) as said, open(folder / f"{rank}.out", "w") as out:
        os.dup2(said.fileno(), 2)
        os.dup2(out.fileno(), 1)
        sys.stdout, sys.stderr = out, said
        faulthandler.dump_traceback_later(PATIENCE_S, file=said)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
        try:
            work = cloudpickle.loads(sent)
            torch.set_num_threads(1)
            if launched:
                named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in named.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
                code = work(rank)
            else:
                store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
                patience = timedelta(seconds=PATIENCE_S)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
                result = work(rank)
                (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
                dist.barrier()
                code = 0
        except ValueError as error:
            print(error, file=said)
            code = 2
            time.sleep(1 if rank == 0 else 0)  # rank 0 has the store
        except BaseException:
            traceback.print_exc(file=said)
        finally:
            atexit._run_exitfuncs()
            out.flush()
            said.flush()
            os._exit(code)
