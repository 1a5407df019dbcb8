"""Runs `main.py` in processes of their own, alone or as one run of several."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTED: list[subprocess.Popen] = []


def start(
    arguments: list[str],
    *,
    devices: int = 1,
    environment: dict[str, str] | None = None,
    first_of_all: str = "",
    **kwargs,
) -> subprocess.Popen:
    """One process of `main.py` on so many CPU devices; Python may be executed before."""
    variables = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    program = [str(ROOT / "main.py")]
    if first_of_all:
        run = "import main; main.app.run(main.main, flags_parser=main.parse)"
        program = ["-c", f"{first_of_all}\n{run}"]
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=variables | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **kwargs,
    )  # fmt: skip
    STARTED.append(process)
    return process


def end_all() -> None:
    """What a failed test has left running."""
    while STARTED:
        STARTED.pop().kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_together(
    arguments: list[str], *, number: int = 2, devices: int = 2, first_of_all: str = ""
) -> list[subprocess.Popen]:
    """Processes that find each other over the loopback interface."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        start(
            [*arguments, address, f"--num_processes={number}", f"--process_id={rank}"],
            devices=devices,
            first_of_all=first_of_all,
        )
        for rank in range(number)
    ]


def finish(processes: list[subprocess.Popen], code: int = 0, timeout: float = 300) -> list[str]:
    """What each of them said; all must end with this code."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [code] * len(processes), "\n-----\n".join(said)
    return said
