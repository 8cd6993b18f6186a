"""One process a rank, over gloo on this machine."""

import os
import subprocess
import sys
from pathlib import Path


def run(worker: Path, folder: Path, count: int, seconds: int, **environment: str) -> None:
    """Run `worker RANK FOLDER` for every rank at once; fails with the output of one that fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # stays on this machine, whatever its host name resolves to
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
