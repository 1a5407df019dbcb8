"""Cost of a training step of every objective, over that of an order-1 denoising step.

    python -m benchmarks.objectives [--rounds=7] [--batch_size=8] [--only=remat]

A step is value, gradient and Adam of a U-Net on 16×16×3, VP. The objectives take turns within one
process, so a machine whose speed drifts slows all of them. `time` is the median over the rounds of
the ratio to order 1 in the same round, `fastest` the ratio of the fastest rounds, `cpu` the median
for CPU seconds of the process, which other processes disturb less. Flops and temporary memory are
those that XLA reports of the compiled step; `compile` includes tracing.

`published` rows are the formulations of the published codes, written here: order 3 by reverse over
forward mode; the Fokker–Planck residual by reverse over reverse mode, differences in time, and six
evaluations of the network.
`cells` rows have the head of 256 levels in place of the noise.
`remat` rows are those of model.remat. On CPU, XLA as of jax 0.10 drops the barriers between the two
passes before it orders the operations, so that memory falls little or not at all; that of jax 0.12
does not, nor does the former with XLA_FLAGS=--xla_disable_hlo_passes=cse_barrier_expander.
Times hold for this machine only, ratios carry over to similar ones, flops everywhere.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import losses
import train_state
from dequantization import Pixels
from fokker_planck import FokkerPlanck
from heads import Cells
from high_order import HighOrder, second_order_residual, third_order_residual
from models import MODELS
from operators import (
    Batched,
    PerExample,
    dimension,
    fold_in_all,
    inner,
    rademacher,
    scale,
    squared_norm,
)
from parameterization import HeadModel, ScoreFn, ScoreModel
from run_lib import devices
from sde_lib import SDE, VPSDE
from terms import Parts, Point, Terms

SHAPE = (16, 16, 3)
NETWORK = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 2, "attn_resolutions": (8,)}
BASELINE = "order 1"


class PublishedThirdOrder(Terms):
    """Orders 1, 2 and 3 by one reverse pass over one jvp, as `value_hvp_and_gradient`.

    Reference: Lu et al. 2022, https://arxiv.org/abs/2206.08265, theorems 3.2 and 3.3.
    """

    def shared_parts(self, score_fn: ScoreFn, sde: SDE, point: Point) -> Parts:
        """dsm, frobenius, trace and third."""
        x, t, z, keys = point.x, point.t, point.z, point.keys
        d, sigma, v = dimension(x), sde.sigma(t), rademacher(fold_in_all(keys, 0), x)
        field = lambda y: score_fn(y, t)  # noqa: E731

        def quadratic_form(y: Batched) -> tuple[jax.Array, tuple[Batched, Batched]]:
            score, hv = jax.jvp(field, (y,), (v,))
            return jnp.sum(v * hv), (score, hv)

        cubic, (score, hv) = jax.grad(quadratic_form, has_aux=True)(x)
        e1 = scale(sigma, score) + z
        a_v = second_order_residual(e1, hv, v, sigma)
        return {
            "dsm": squared_norm(e1) / d,
            "frobenius": squared_norm(a_v) / d**2,
            "trace": inner(v, a_v) ** 2 / d**2,
            "third": squared_norm(third_order_residual(e1, hv, cubic, v, sigma)) / d**3,
        }


class PublishedFokkerPlanck(Terms):
    """The residual with vjp of vjp for ∇ₓ and three evaluations for ∂t.

    ∂t s ≈ [h² s(t + k) + (k² − h²) s(t) − k² s(t − h)] / [h k (h + k)], h = 1e-3, k = 5e-4, at
    times that are clipped such that all three lie within (0, T); the published ones are not.
    Reference: Lai et al. 2023, https://arxiv.org/abs/2210.04296, eq. (7).
    """

    def shared_parts(self, score_fn: ScoreFn, sde: SDE, point: Point) -> Parts:
        """Return the parts dsm and fp, one value per example."""
        x, t, z, keys = point.x, point.t, point.z, point.keys
        d, v, h, k = dimension(x), rademacher(fold_in_all(keys, 0), x), 1e-3, 5e-4
        t = jnp.clip(t, 2.0 * h, sde.T - k)
        a, half_g2 = sde.drift_coefficient(t), 0.5 * sde.g2(t)

        def potential(y: Batched) -> PerExample:
            score = score_fn(y, t)
            _, pull = jax.vjp(lambda u: score_fn(u, t), y)
            return half_g2 * (inner(v, pull(v)[0]) + squared_norm(score)) - a * inner(y, score)

        _, pull = jax.vjp(potential, x)
        later, now, earlier = score_fn(x, t + k), score_fn(x, t), score_fn(x, t - h)
        dt_score = (h**2 * later + (k**2 - h**2) * now - k**2 * earlier) / (h * k * (h + k))
        residual = dt_score - pull(jnp.ones_like(t))[0]
        e1 = scale(sde.sigma(t), score_fn(x, t)) + z
        return {"dsm": squared_norm(e1) / d, "fp": squared_norm(residual) / d}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what is trained, how, and what the ratios should be at most."""

    terms: Terms
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    remat: str = "none"
    head: bool = False  # `cells` of 256 levels in place of the noise


def _third(form: str, fraction: float = 1.0) -> HighOrder:
    return HighOrder(3, third_order_form=form, fraction=fraction)


def _residual(form: str, fraction: float = 1.0) -> FokkerPlanck:
    return FokkerPlanck(alpha=0.15, form=form, fraction=fraction)


SECOND = Terms(high_order=HighOrder(2))
DIRECTIONAL = Terms(high_order=_third("directional"))
SECOND_TARGETS = {"time": 2.0, "memory": 1.5}
DIRECTIONAL_TARGETS = {"flops": 3.6, "time": 4.0, "memory": 3.5}
CASES: dict[str, Case] = {
    BASELINE: Case(Terms()),
    "order 1 remat keep_convs": Case(Terms(), remat="keep_convs"),
    "order 1 remat block": Case(Terms(), remat="block"),
    "order 1 ism": Case(Terms(objective="ism")),
    "order 2": Case(SECOND, SECOND_TARGETS),
    "order 2 remat keep_convs": Case(SECOND, SECOND_TARGETS, remat="keep_convs"),
    "order 2 remat block": Case(SECOND, SECOND_TARGETS, remat="block"),
    "order 3 published": Case(PublishedThirdOrder(high_order=_third("gradient"))),
    "order 3 gradient": Case(Terms(high_order=_third("gradient")), {"time": 5.0}),
    "order 3 directional": Case(DIRECTIONAL, DIRECTIONAL_TARGETS),
    "order 3 directional remat keep_convs": Case(
        DIRECTIONAL, DIRECTIONAL_TARGETS, remat="keep_convs"
    ),
    "order 3 directional remat block": Case(DIRECTIONAL, DIRECTIONAL_TARGETS, remat="block"),
    "order 3 directional 1/2": Case(
        Terms(high_order=_third("directional", fraction=0.5)), {"time": 2.3}
    ),
    "FPE published": Case(PublishedFokkerPlanck(fokker_planck=_residual("gradient"))),
    "FPE gradient": Case(Terms(fokker_planck=_residual("gradient")), {"flops": 5.7}),
    "FPE advective": Case(Terms(fokker_planck=_residual("advective")), {"flops": 3.6}),
    "order 3 directional + FPE advective": Case(
        Terms(high_order=_third("directional"), fokker_planck=_residual("advective")),
        {"time": 5.0},
    ),
    "order 3 directional 1/2 + FPE advective 1/2": Case(
        Terms(high_order=_third("directional", 0.5), fokker_planck=_residual("advective", 0.5))
    ),
    "cells, order 1": Case(Terms(), head=True),
    "cells, order 2": Case(SECOND, head=True),
    "cells, order 3 directional": Case(DIRECTIONAL, head=True),
    "cells, FPE advective": Case(Terms(fokker_planck=_residual("advective")), head=True),
}


@dataclasses.dataclass
class Run:
    """A compiled step, its state, and what XLA says of it."""

    step: Any
    state: Any
    batch: Any
    compile_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    def take(self) -> None:
        """Take one step and write down its seconds."""
        key = jax.random.key(1)
        start, cpu_start = time.perf_counter(), time.process_time()
        self.state, metrics = jax.block_until_ready(self.step(self.state, key, self.batch))
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)
        assert np.isfinite(metrics["loss"]).all(), metrics

    @property
    def flops(self) -> float:
        """Operations of one step."""
        return self.step.cost_analysis()["flops"]

    @property
    def memory(self) -> int:
        """Return the temporary bytes that XLA reports of the compiled step."""
        return self.step.memory_analysis().temp_size_in_bytes


def score_model(case: Case) -> ScoreModel:
    """A DDPM that predicts the noise, or that has the head `cells`."""
    network = functools.partial(MODELS["ddpm"], **NETWORK, remat=case.remat)
    if not case.head:
        return ScoreModel(network(), VPSDE())
    head = Cells(256, -1.0, 1.0)
    return HeadModel(network(outputs=head.outputs), VPSDE(), head=head)


def compiled(case: Case, batch_size: int) -> Run:
    """The case as `run_lib.training` takes single steps, of a DDPM without dropout."""
    model, sde = score_model(case), VPSDE()
    law = losses.time_law(sde, smallest_time=1e-3)
    per_example = losses.score_matching(
        model, Pixels(256), law, case.terms, batch_size=batch_size, train=True
    )
    loss_fn = losses.mean_loss(per_example)
    config = train_state.OptimizerConfig("adam", 2e-4, 0.9, 0.999, 1e-8, 0.0, 0, 1.0, "constant")
    optimizer = config.chain(1000)
    state = train_state.create(model.init(jax.random.key(0), SHAPE), optimizer)
    step = devices.map_over_devices(
        train_state.single_step(train_state.train_step(loss_fn, optimizer, 0.999, "batch")),
        in_axes=(None, None, 1), out_axes=None, donate_argnums=(0,),
    )  # fmt: skip
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.integers(256, size=(1, batch_size, *SHAPE), dtype=np.uint8),
        "noise_id": np.arange(batch_size, dtype=np.int32)[None],
        "mask": np.ones((1, batch_size), bool),
    }
    batch = devices.split(batch, axis=1)
    start = time.perf_counter()
    executable = step.lower(state, jax.random.key(1), batch).compile()
    return Run(executable, state, batch, time.perf_counter() - start)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the ratios by round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def row(name: str, run: Run, baseline: Run) -> str:
    """One line of the table."""
    ratios = {
        "time": median_ratio(run.seconds[1:], baseline.seconds[1:]),
        "flops": run.flops / baseline.flops,
        "memory": run.memory / baseline.memory,
    }
    fastest = min(run.seconds[1:]) / min(baseline.seconds[1:])
    cpu = median_ratio(run.cpu_seconds[1:], baseline.cpu_seconds[1:])
    targets = (
        f"{column} ≤ {limit} {'✓' if ratios[column] <= limit else '✗'}"
        for column, limit in CASES[name].targets.items()
    )
    return (
        f"| {name} | {ratios['time']:.2f} | {fastest:.2f} | {cpu:.2f} | {ratios['flops']:.2f} | "
        f"{ratios['memory']:.2f} | {run.compile_seconds:.0f} | {', '.join(targets)} |"
    )


def main() -> None:
    """Print the table of the costs of every objective."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    chosen = [name for name in CASES if name == BASELINE or options.only in name]
    runs = {name: compiled(CASES[name], options.batch_size) for name in chosen}
    for _ in range(options.rounds + 1):  # the first is not counted
        for run in runs.values():
            run.take()
    baseline = runs[BASELINE]
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {options.batch_size}, "
        f"{options.rounds} rounds; {BASELINE}: {1e3 * statistics.median(baseline.seconds[1:]):.0f} "
        f"ms (fastest {1e3 * min(baseline.seconds[1:]):.0f}), {baseline.flops / 1e9:.2f} GFLOP, "
        f"{baseline.memory / 2**20:.1f} MiB\n"
    )
    print("| objective | time | fastest | cpu | flops | memory | compile s | target |")
    print("|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        print(row(name, run, baseline))


if __name__ == "__main__":
    main()
