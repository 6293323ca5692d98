"""Start a training run as several real processes, and what such a process is: `launch.train` that notes its reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def write_config(config: dict[str, Any], path: Path) -> Path:
    """A configuration as a file that `--config` takes."""
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config!r})\n"
    )
    return path


class Run:
    """Processes of one run, process i writing to OUTPUT/i.log.

    Parameters
    ----------
    config
        File of the configuration.
    workdir
        Run folder.
    count
        How many processes.
    words
        Further flags.
    env
        Environment of each process, where that tells the processes of each other instead of flags.
    """

    def __init__(
        self, config: Path, workdir: Path, count: int, *words: str, env: Iterable[dict[str, str]] = ()
    ):
        self.output = workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}")
        self.output.mkdir(parents=True)
        self.workdir, self.count = workdir, count
        where = f"--coordinator=127.0.0.1:{free_port()}"
        flags = [[where, f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]
        settings = list(env) or [{}] * count
        if env:
            flags = [[] for _ in settings]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "tests.distributed.processes", str(self.output / f"{i}.json"),
                    f"--config={config}", f"--workdir={workdir}", "--multihost", *flags[i], *words,
                ],
                cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", **settings[i]},
                stdout=(self.output / f"{i}.log").open("w"), stderr=subprocess.STDOUT,
            )
            for i in range(count)
        ]  # fmt: skip

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, number: int) -> str:
        """What a process has printed so far."""
        return (self.output / f"{number}.log").read_text()

    def everything(self) -> str:
        """What all of them have printed."""
        return "\n".join(f"--- {i}\n{self.said(i)}" for i in range(self.count))

    def read(self, number: int) -> set[tuple[int, int]]:
        """Which bags (number, epoch) of the training data a process has read."""
        return {tuple(entry) for entry in json.loads((self.output / f"{number}.json").read_text())}

    def statuses(self, timeout: float = 600) -> list[int]:
        """Wait for all to end."""
        return [process.wait(timeout) for process in self.processes]

    def kill_at(self, step: int, victim: int) -> float:
        """Kill a process once a checkpoint of a step is complete; gives the time of death."""
        while not (self.workdir / "checkpoints" / str(step)).is_dir():
            assert all(process.poll() is None for process in self.processes), self.everything()
            time.sleep(0.1)
        os.kill(self.processes[victim].pid, signal.SIGKILL)
        return time.monotonic()


def main() -> None:
    """Train with the flags of the command line; the first word is where to note which bags were read."""
    from sct.data.bags import BagSource

    notes, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
    seen: list[tuple[int, int]] = []
    real = BagSource.record

    def noted(self: BagSource, number: int, epoch: int = 0) -> Any:
        if not self.exhaustive:
            seen.append((number, epoch))
        return real(self, number, epoch)

    BagSource.record = noted
    from sct.cli import main as command

    try:
        command("train")
    finally:
        notes.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
