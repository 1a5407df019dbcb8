"""Strict numerics for every test: no implicit rank promotion, float64 where a test asks for it."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests, and the processes that they start, compile the same tiny run: compile it once.
CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# These versions compile for the CPU in 0.6 of the time with their older emitters, at -O2. The whole
# run of test_architecture compiles as users do, and so do, with XLA_FLAGS= in the environment, all
# files that are not compiled_at_o0.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=2"
)
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", QUICK)

# JAX traces into very many small objects: looking for cycles among them all takes 8 % of the time.
gc.set_threshold(200_000, 20, 1000)

import jax
import pytest
from jax.extend.backend import clear_backends

from plotting import Curve, save_curves
from tests import processes

jax.config.update("jax_numpy_rank_promotion", "raise")

SMALL_FIGURES = {
    "STEPS": 10,
    "STOPS": (5, 10),
    "LINE_STOPS": (0, 5, 10),
    "POINTS": 24,
    "CELLS": 12,
}


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 arithmetic with strict dtype promotion, for tests against closed forms."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


def several_devices() -> Iterator[None]:
    """Four devices instead of one, for which programs take longer to compile and to run."""
    before = jax.config.jax_num_cpu_devices
    clear_backends()
    jax.config.update("jax_num_cpu_devices", 4)
    yield
    clear_backends()
    jax.config.update("jax_num_cpu_devices", before)


four_devices = pytest.fixture(several_devices, scope="module")
four_devices_here = pytest.fixture(several_devices)  # for one test of a file


@pytest.fixture(scope="module")
def compiled_at_o0() -> Iterator[None]:
    """No optimisation: for files whose programs compile for longer than they run.

    Not for all: at -O0, XLA makes NaN of the Jacobian of a mixture's score.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised(compiled_at_o0: None) -> Iterator[None]:
    """Optimise the programs of one test of such a file."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of toy runs are drawn from few points in few steps, of the curves the first."""
    if "run_lib.figures" in sys.modules:
        for name, value in SMALL_FIGURES.items():
            monkeypatch.setattr(f"run_lib.figures.{name}", value)
    if "run_lib.page" in sys.modules:
        monkeypatch.setattr("run_lib.page.plotting.save_curves", first_curve)


def first_curve(path: Path, panels: dict[str, dict[str, Curve]]) -> None:
    """The picture of one quantity instead of one of each."""
    save_curves(path, dict(list(panels.items())[:1]))


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """An endless run of a test that failed would slow down all that follow."""
    yield
    processes.end_all()


@pytest.fixture(autouse=True, scope="module")
def the_logger_is_as_before() -> Iterator[None]:
    """What a file of tests writes to, no other writes to."""
    logger = logging.getLogger("fokker")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """Programs of one test file are of no use to the next: without this they take gigabytes."""
    yield
    jax.clear_caches()
