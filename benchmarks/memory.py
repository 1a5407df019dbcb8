"""Memory and time of an order-3 step in microbatches and with rematerialisation.

    python -m benchmarks.memory [--batch_size=64] [--size=32] [--rounds=3]

Order 3 `directional` of a U-Net, VP, one device, the same global batch in every row; ratios to the
first row. Memory is what XLA reports as temporary. The rows take turns within one process. On CPU
the parts of a batch are written out one after the other, and as of jax 0.10 XLA there drops the
barriers between them, so that their memory is not shared: see jax 0.12 or a GPU.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

import losses
import train_state
from dequantization import Pixels
from high_order import HighOrder
from models import MODELS
from parameterization import ScoreModel
from run_lib import devices
from sde_lib import VPSDE
from terms import Terms

NETWORK = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
ROWS = {
    "whole batch": ("none", 1),
    "model.remat=keep_convs": ("keep_convs", 1),
    "training.microbatch=1/8": ("none", 8),
    "both": ("keep_convs", 8),
}


class Run(NamedTuple):
    """A compiled gradient, what it is called with, its temporary bytes, compile time, seconds."""

    step: jax.stages.Compiled
    arguments: tuple
    temporary: int
    compile_seconds: float
    seconds: list[float]

    def take(self) -> None:
        """Run one more step and record its seconds."""
        start = time.perf_counter()
        jax.block_until_ready(self.step(*self.arguments))
        self.seconds.append(time.perf_counter() - start)


def compiled(remat: str, num_microbatches: int, batch_size: int, size: int) -> Run:
    """Value and gradient of one batch."""
    shape = (size, size, 3)
    model = ScoreModel(MODELS["ddpm"](**NETWORK, remat=remat), VPSDE())
    law = losses.time_law(
        model.sde, smallest_time=1e-5, likelihood_weighting=True, importance_weighting=True
    )
    terms = Terms(high_order=HighOrder(3, third_order_form="directional"))
    per_example = losses.score_matching(
        model, Pixels(256), law, terms, batch_size=batch_size, train=True
    )
    gradient = train_state.accumulated_gradient(losses.mean_loss(per_example), num_microbatches)
    batch = {
        "image": np.random.default_rng(0).integers(256, size=(batch_size, *shape), dtype=np.uint8),
        "noise_id": np.arange(batch_size, dtype=np.int32),
        "mask": np.ones(batch_size, bool),
    }
    mapped = devices.map_over_devices(gradient, in_axes=(None, None, 0), out_axes=0)
    arguments = (model.init(jax.random.key(0), shape), jax.random.key(1), devices.put(batch))
    start = time.perf_counter()
    step = mapped.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    arguments = (devices.replicate(arguments[0]), devices.replicate(arguments[1]), arguments[2])
    return Run(step, arguments, step.memory_analysis().temp_size_in_bytes, seconds, [])


def main() -> None:
    """Print the table of memory, time and compile time of every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = {name: compiled(*row, options.batch_size, options.size) for name, row in ROWS.items()}
    for _ in range(options.rounds + 1):  # the first is not counted
        for run in runs.values():
            run.take()
    first = next(iter(runs.values()))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, order 3 directional, batch "
        f"{options.batch_size} of {options.size}×{options.size}×3, {options.rounds} rounds\n"
    )
    print("| levers | temporary MiB | memory | time | compile s |")
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        pairs = zip(run.seconds[1:], first.seconds[1:], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"| {name} | {run.temporary / 2**20:.0f} | {run.temporary / first.temporary:.2f} "
            f"| {ratio:.2f} | {run.compile_seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
