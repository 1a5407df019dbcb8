"""Images per second of one train step for each network, with XLA's flop count and temporary memory.

    python -m benchmarks.train_step [--batch_size=64] [--rounds=7]

The networks take turns within one process, so a machine whose speed drifts slows all of them;
medians are printed. Times hold for this machine only, ratios carry over.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

import losses
import train_state
from dequantization import Pixels
from models import MODELS
from parameterization import ScoreModel
from run_lib import devices
from sde_lib import VPSDE
from terms import Terms

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mlp 8x8x1": ("mlp", (8, 8, 1), {"hidden": 256, "depth": 4, "dropout": 0.1}),
    "ddpm 8x8x1": (
        "ddpm",
        (8, 8, 1),
        {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)},
    ),
    "ddpm 28x28x1": (
        "ddpm",
        (28, 28, 1),
        {"nf": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "attn_resolutions": (7,)},
    ),
}


def compiled_step(name: str, shape: tuple[int, ...], fields: dict, batch_size: int) -> tuple:
    """(step, state, batch, flops, temporary bytes) of one case."""
    sde = VPSDE()
    model = ScoreModel(MODELS[name](**fields), sde)
    law = losses.time_law(
        sde,
        smallest_time=1e-5,
        likelihood_weighting=True,
        importance_weighting=True,
        debias=False,
        stratified=False,
    )
    per_example = losses.score_matching(
        model, Pixels(256), law, Terms(), batch_size=batch_size, train=True
    )
    config = train_state.OptimizerConfig("adam", 2e-4, 0.9, 0.999, 1e-8, 0.0, 0, 1.0, "constant")
    optimizer = config.chain(1000)
    state = train_state.create(model.init(jax.random.key(0), shape), optimizer)
    step_fn = train_state.train_step(losses.mean_loss(per_example), optimizer, 0.999, "batch")
    step = devices.map_over_devices(
        step_fn, in_axes=(None, None, 0), out_axes=None, donate_argnums=(0,)
    )
    batch = devices.split(
        {
            "image": np.zeros((batch_size, *shape), np.uint8),
            "noise_id": np.arange(batch_size, dtype=np.int32),
            "mask": np.ones(batch_size, bool),
        }
    )
    executable = step.lower(state, jax.random.key(1), batch).compile()
    flops = executable.cost_analysis()["flops"]
    temporary = executable.memory_analysis().temp_size_in_bytes
    return step, state, batch, flops, temporary


def main() -> None:
    """Print the table of speed, flops and memory of every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cases = {name: compiled_step(*case, options.batch_size) for name, case in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds + 1):
        for name, (step, state, batch, flops, temporary) in cases.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, jax.random.key(1), batch))
            times[name].append(time.perf_counter() - start)
            cases[name] = (step, state, batch, flops, temporary)
    print(f"{jax.devices()[0].device_kind}, batch {options.batch_size}, {options.rounds} rounds")
    print(f"{'network':14}{'params':>11}{'images/s':>10}{'ms/step':>9}{'GFLOP':>8}{'temp MiB':>10}")
    for name, (_, state, _, flops, temporary) in cases.items():
        median = statistics.median(times[name][1:])
        params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(
            f"{name:14}{params:11,}{options.batch_size / median:10.0f}{1e3 * median:9.1f}"
            f"{flops / 1e9:8.2f}{temporary / 2**20:10.1f}"
        )


if __name__ == "__main__":
    main()
