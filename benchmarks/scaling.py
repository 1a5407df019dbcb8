"""Measure how a training step scales: devices, steps per dispatch, on a GPU the objectives.

    python -m benchmarks.scaling [--part=devices|dispatch|gpu] [--rounds=5]

devices   weak scaling over CPU devices: steps of d devices with 32 images each, in a process each;
          with as many devices as cores the ideal is 1, beyond it d / cores
dispatch  time of a step by training.n_jitted_steps, the MLP of the digits
gpu       DDPM++ of 32×32×3, nf = 128, batch 64: images/s and TFLOP/s of orders 1, 2, 3 and of the
          Fokker–Planck term in float32 and bfloat16, against the measured peak of matrix products,
          and images/s of the ODE likelihood. Needs jax, flax, optax, diffrax, orbax and numpy alone

The variants of a part take turns within one process (but for `devices`); medians are printed. TFLOP
are those that XLA counts in the compiled step, rematerialisation and all. Without a GPU the default
is the first two parts, with one it is the last.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import losses
import train_state
from dequantization import Pixels
from fokker_planck import FokkerPlanck
from high_order import HighOrder
from likelihood import Divergence, ode_log_likelihood
from models import MODELS
from ode import Solver
from operators import fold_in_each
from parameterization import ScoreModel
from sde_lib import VPSDE
from terms import Terms

AXIS = "batch"
ADAM = train_state.OptimizerConfig("adam", 2e-4, 0.9, 0.999, 1e-8, 0.0, 0, 1.0, "constant")
MLP = ("mlp", {"hidden": 256, "depth": 4, "dropout": 0.1}, (8, 8, 1))
DDPMPP = (
    "ncsnpp",
    {
        "nf": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 4, "attn_resolutions": (16,),
        "resamp_with_conv": True, "fir": False, "skip_rescale": True, "resblock_type": "biggan",
        "progressive": "none", "progressive_input": "none", "embedding_type": "positional",
        "dropout": 0.1,
    },
    (32, 32, 3),
)  # fmt: skip
OBJECTIVES = {
    "order 1": Terms(),
    "order 2": Terms(high_order=HighOrder(2)),
    "order 3 directional": Terms(high_order=HighOrder(3, third_order_form="directional")),
    "Fokker–Planck advective": Terms(fokker_planck=FokkerPlanck(alpha=1.0, form="advective")),
}


def model_of(network: str, fields: dict[str, Any]) -> ScoreModel:
    """Network and VP SDE."""
    return ScoreModel(MODELS[network](**fields), VPSDE())


class Step:
    """A compiled training step on all devices of this process, and how long it takes."""

    def __init__(
        self,
        model: ScoreModel,
        shape: tuple[int, ...],
        terms: Terms,
        batch_size: int,
        number: int = 1,
    ) -> None:
        law = losses.time_law(
            model.sde, smallest_time=1e-5, likelihood_weighting=True, importance_weighting=True
        )
        per_example = losses.score_matching(
            model, Pixels(256), law, terms, batch_size=batch_size, train=True
        )
        optimizer = ADAM.chain(1000)
        one = train_state.train_step(losses.mean_loss(per_example), optimizer, 0.999, AXIS)
        several = train_state.single_step(one) if number == 1 else train_state.many_steps(one)
        devices = jax.device_count()
        mapped = jax.pmap(
            several, AXIS, in_axes=(None, None, 1), out_axes=None, donate_argnums=(0,)
        )
        rng = np.random.default_rng(0)
        lead = (number, devices, batch_size // devices)
        ids = np.arange(batch_size, dtype=np.int32).reshape(lead[1:])
        self.batch = {
            "image": rng.integers(256, size=(*lead, *shape), dtype=np.uint8),
            "noise_id": np.tile(ids, (number, 1, 1)),
            "mask": np.ones(lead, bool),
        }
        self.key = jax.random.key(1)
        self.state = train_state.create(model.init(jax.random.key(0), shape), optimizer)
        self.compiled = mapped.lower(self.state, self.key, self.batch).compile()
        self.step, self.seconds = mapped, []
        self.number, self.images = number, number * batch_size

    def take(self, times: int = 1) -> None:
        """So many more dispatches."""
        started = time.perf_counter()
        for _ in range(times):
            self.state, _ = self.step(self.state, self.key, self.batch)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - started) / times)

    @property
    def median(self) -> float:
        """Seconds of a dispatch, without the first."""
        return statistics.median(self.seconds[1:])


def print_devices(rounds: int) -> None:
    """Weak scaling, a process for every number of devices."""
    cores, first = os.cpu_count(), None
    print(f"weak scaling, {cores} cores, 32 images per device, small U-Net of 16×16×3")
    print("devices  ms/step  efficiency  ideal")
    for devices in (1, 2, 4):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.scaling", "--part=one", f"--rounds={rounds}"]
        output = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        seconds = float(output.stdout.split()[-1])
        first = first or seconds
        ideal = min(1.0, cores / devices)
        print(f"{devices:7} {1e3 * seconds:8.1f} {first / seconds:11.2f} {ideal:6.2f}", flush=True)


def print_one(rounds: int) -> None:
    """Seconds of a step with the devices of this process."""
    fields = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
    step = Step(model_of("ddpm", fields), (16, 16, 3), Terms(), 32 * jax.device_count())
    for _ in range(rounds + 1):
        step.take(3)
    print(step.median)


def print_dispatch(rounds: int) -> None:
    """Time of a step by the number of steps in a dispatch."""
    network, fields, shape = MLP
    steps = [Step(model_of(network, fields), shape, Terms(), 128, n) for n in (1, 5, 20, 100)]
    for _ in range(rounds + 1):
        for step in steps:
            step.take(200 // step.number)
    print(f"{jax.devices()[0].device_kind}, MLP of the digits, batch 128")
    print("n_jitted_steps  ms/step  over 1")
    for step in steps:
        ms = 1e3 * step.median / step.number
        print(f"{step.number:14} {ms:8.3f} {1e3 * steps[0].median / ms:7.2f}")


def seconds_of(function: Callable[[], Any], rounds: int) -> float:
    """Median, after one call that is not counted."""
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def peak(dtype: str, rounds: int) -> float:
    """TFLOP/s of products of 8192×8192 matrices."""
    n, number = 8192, 10
    a = jnp.ones((n, n), dtype)

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, number, lambda _, y: (y @ a) * jnp.asarray(1 / n, dtype), x)

    return number * 2 * n**3 / seconds_of(lambda: products(a), rounds) / 1e12


def print_gpu(rounds: int, batch_size: int = 64) -> None:
    """Objectives and likelihood of DDPM++."""
    network, fields, shape = DDPMPP
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, DDPM++ nf=128, 32×32×3")
    print("| dtype | objective | images/s | ms/step | TFLOP/s | of the peak | memory GiB |")
    print("|---|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        top = peak(dtype, rounds)
        print(f"| {dtype} | matrix products | | | {top:.1f} | 1 | |", flush=True)
        model = model_of(network, fields | {"dtype": dtype})
        for name, terms in OBJECTIVES.items():
            try:
                step = Step(model, shape, terms, batch_size)
                for _ in range(rounds + 1):
                    step.take(3)
            except jax.errors.JaxRuntimeError as error:
                print(f"| {dtype} | {name} | {str(error).splitlines()[0][:80]} |", flush=True)
                continue
            rate = step.compiled.cost_analysis()["flops"] / step.median / 1e12
            temporary = step.compiled.memory_analysis().temp_size_in_bytes / 2**30
            print(
                f"| {dtype} | {name} | {step.images / step.median:.0f} | {1e3 * step.median:.1f} "
                f"| {rate:.1f} | {rate / top:.2f} | {temporary:.1f} |",
                flush=True,
            )
    print_likelihood(model_of(network, fields), shape, rounds)


def print_likelihood(model: ScoreModel, shape: tuple[int, ...], rounds: int) -> None:
    """Images per second of the ODE likelihood of an untrained network, equal steps."""
    params, ids = model.init(jax.random.key(0), shape), jnp.arange(256)
    x = 0.3 * jax.random.normal(jax.random.key(1), (256, *shape))
    solver = dataclasses.replace(Solver("dopri5"), num_steps=16, estimate_error=False)

    @jax.jit
    def log_p(params: Any, x: jax.Array) -> Any:
        keys = fold_in_each(jax.random.key(2), ids)
        return ode_log_likelihood(
            model.score(params),
            model.sde,
            x,
            keys,
            t_min=1e-5,
            solver=solver,
            divergence=Divergence("rademacher"),
        ).log_p

    rate = len(x) / seconds_of(lambda: log_p(params, x), rounds)
    print(f"\nODE log-likelihood, 16 equal steps of dopri5, batch {len(x)}: {rate:.1f} images/s")


PARTS = {"devices": print_devices, "dispatch": print_dispatch, "gpu": print_gpu, "one": print_one}


def main() -> None:
    """Print the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    default = ["gpu"] if jax.default_backend() == "gpu" else ["devices", "dispatch"]
    for part in options.part or default:
        PARTS[part](options.rounds)


if __name__ == "__main__":
    main()
