"""Starting several processes of one job, and waiting for them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def environment(**added):
    """This process's environment, with the package that is tested and one thread per process."""
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | {name: str(v) for name, v in added.items()}


def start(arguments, folder, size, **added):
    """Processes that run ``python ARGUMENTS`` as a launcher would start them; their output goes to files."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(size):
        place = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(folder / f"log-{rank}", "w") as log:
            command = [sys.executable, *map(str, arguments)]
            found.append(
                subprocess.Popen(command, env=environment(**place, **added), stdout=log, stderr=log, cwd=folder)
            )
    return found


def finish(started, limit=240.0):
    """Exit codes."""
    try:
        return [process.wait(limit) for process in started]
    finally:
        for process in started:
            process.kill()
