"""Commands that msrun starts: real processes that work together."""

import os
import random
import socket
import sys
from pathlib import Path

BIN = str(Path(sys.executable).parent)
# Below the ports that Linux gives to whoever asks for any: those may be taken before a slow start binds its own.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def msrun(log, *task):
    """The command that starts two workers, and its environment: a crash writes the Python stack to the log."""
    start = ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}", "--join=True"]
    start += ["--cluster_time_out=600", f"--log_dir={log}"]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return [*start, *map(str, task)], os.environ | {"PATH": path, "PYTHONFAULTHANDLER": "1"}


def logs(folder):
    """The ends of the workers' logs."""
    return "".join(path.read_text(errors="replace")[-3000:] for path in folder.glob("worker_*.log"))
