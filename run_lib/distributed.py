"""The processes of one run: how they find each other."""

import importlib.util
import logging
import os
import socket
import time

import jax

from checks import require

logger = logging.getLogger("fokker")
# Number of processes of this launch, as the launchers tell it.
LAUNCHERS = {"Slurm": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
ADDRESS_OF_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"  # told by versions up to 4; by this JAX finds it
CONNECT_S = 300  # until all processes must have come
SILENCE_S = 60  # after which a process counts as dead, and all others end


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes; a process alone does nothing. Before the first use of a device.

    By the three arguments, else by what Slurm, Open MPI or a Cloud TPU tell; then the arguments
    stay empty.

    If some never come, JAX aborts those that did (code 134).

    Raises:
        ValueError: an argument is missing or out of range, or nobody answers at its address.
    """
    given = {"num_processes": num_processes, "process_id": process_id}
    if coordinator:
        _check(coordinator, **given)
        if process_id > 0:
            _wait_for(coordinator)
        elif num_processes > 1:
            logger.info(
                "waiting up to %d s for %d processes at %s", CONNECT_S, num_processes, coordinator
            )
        _initialize(f"--coordinator={coordinator}", coordinator_address=coordinator, **given)
        return
    for name, value in given.items():
        require(value is None, f"--{name}", value, "--coordinator=HOST:PORT with it")
    if name := _launcher():
        _initialize(name)


def _check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    require(bool(host) and port.isdecimal(), "--coordinator", coordinator, "HOST:PORT")
    require((num_processes or 0) >= 1, "--num_processes", num_processes, "at least 1")
    inside = process_id is not None and 0 <= process_id < num_processes
    require(inside, "--process_id", process_id, f"0 to {num_processes - 1}")


def _wait_for(coordinator: str) -> None:
    """Until process 0 listens: JAX would abort where it does not."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--coordinator={coordinator}: process 0 did not answer in {CONNECT_S} s: "
                    f"started with the same address, port open? {error}"
                ) from None
        time.sleep(0.2)


def _launcher() -> str:
    """What has started several processes; empty where this one is alone."""
    for name, variable in LAUNCHERS.items():
        if int(os.environ.get(variable, "1")) > 1:
            if name == "Open MPI" and ADDRESS_OF_OPEN_MPI not in os.environ:
                raise ValueError("Open MPI 5 tells no address: pass --coordinator=HOST:PORT")
            return name
    devices = ("/dev/accel0", "/dev/vfio/0")  # of older and newer generations
    on_tpu = importlib.util.find_spec("libtpu") and any(map(os.path.exists, devices))
    several = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "Cloud TPU" if on_tpu or several else ""


def _initialize(source: str, **arguments: object) -> None:
    try:
        jax.distributed.initialize(
            initialization_timeout=CONNECT_S, heartbeat_timeout_seconds=SILENCE_S, **arguments
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source}: the processes of this run did not find each other in {CONNECT_S} s; same "
            f"command on all, port open? {str(error).splitlines()[0]}"
        ) from None


def describe() -> str:
    """One line about this process."""
    which = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    kind = jax.local_devices()[0].device_kind
    return f"{which}: {jax.local_device_count()} of {jax.device_count()} device(s), {kind}"
