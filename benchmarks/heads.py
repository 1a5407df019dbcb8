"""Cost of a training step with a head, over that of velocity prediction with the same network.

    python -m benchmarks.heads [--rounds=7] [--only=digits]

`ddpmpp` is DDPM++ (nf = 128, 4 blocks per level) on 32×32×3 with 256 levels: flops and bytes that
XLA counts of a step of 8 images before it optimises; the step is neither compiled nor run.
`digits` is the U-Net of configs/digits/vp.py with 17 levels, `mnist` that of configs/mnist/sharp.py
with 256: the parameterisations take turns in one process, and `time` is the median over the rounds
of the ratio to velocity in the same round. Flops and bytes hold everywhere, times for this machine.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import numpy as np

import losses
from dequantization import Pixels
from heads import Atoms, Cells
from models import MODELS
from parameterization import PARAMETERIZATIONS, TIME_LABELS, HeadModel, ScoreModel
from real_heads import Whitened
from sde_lib import VPSDE
from terms import Terms

DDPMPP = {"nf": 128, "num_res_blocks": 4, "dropout": 0.1}
DIGITS = {"channels": (48,), "blocks": (3,), "summary": 128, "dropout": 0.2}
MNIST = {"channels": (32, 64, 96), "blocks": (1, 2, 2), "summary": 128}
# Name: (network, its fields, shape of an image, levels, images, whether the step is run).
CASES = {
    "ddpmpp": ("ncsnpp", DDPMPP, (32, 32, 3), 256, 8, False),
    "digits": ("unet", DIGITS, (8, 8, 1), 17, 64, True),
    "mnist": ("unet", MNIST, (28, 28, 1), 256, 16, True),
}
KINDS = ("velocity", "whitened", "cells", "atoms")


def model_of(kind: str, network: str, fields: dict[str, Any], levels: int) -> ScoreModel:
    """The network with a head, or predicting the velocity."""
    sde, label, net = VPSDE(), TIME_LABELS["log_snr"], MODELS[network](**fields)
    if kind == "velocity":
        return ScoreModel(net, sde, PARAMETERIZATIONS[kind], label)
    if kind == "whitened":
        return HeadModel(net, sde, label=label, head=Whitened("diagonal"))
    head = Cells(levels, -1.0, 1.0) if kind == "cells" else Atoms(levels, -1.0, 1.0)
    return HeadModel(net.clone(outputs=head.outputs), sde, label=label, head=head)


def compiled(kind: str, case: tuple) -> tuple[Any, tuple]:
    """The gradient of the likelihood-weighted loss, compiled if it is run, and its arguments."""
    network, fields, shape, levels, size, is_run = case
    model = model_of(kind, network, fields, levels)
    encoding = Pixels(levels, dequantize_uniformly=kind != "atoms")
    law = losses.time_law(
        model.sde, smallest_time=1e-5, likelihood_weighting=True, importance_weighting=True
    )  # fmt: skip
    per_example = losses.score_matching(
        model, encoding, law, Terms(), batch_size=size, train=True
    )  # fmt: skip
    gradient = jax.jit(jax.grad(losses.mean_loss(per_example), has_aux=True))
    init = functools.partial(model.init_in_order, jax.random.key(0), shape)
    params = jax.jit(init)() if is_run else jax.eval_shape(init)
    batch = {
        "image": np.random.default_rng(0).integers(levels, size=(size, *shape), dtype=np.uint8),
        "noise_id": np.arange(size, dtype=np.int32),
        "mask": np.ones(size, bool),
    }
    arguments = params, jax.random.key(1), batch
    lowered = gradient.lower(*arguments)
    return lowered.compile() if is_run else lowered, arguments


def table(name: str, rounds: int) -> None:
    """Print one line per parameterisation."""
    case = CASES[name]
    steps = {kind: compiled(kind, case) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds + 1 if case[-1] else 0):
        for kind, (step, arguments) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            seconds[kind].append(time.perf_counter() - start)
    costs = {kind: step.cost_analysis() for kind, (step, _) in steps.items()}
    print(f"{name:10}{'flops':>10}{'bytes':>10}{'time':>10}")
    for kind in KINDS:
        ratios = [
            f"{costs[kind][what] / costs['velocity'][what]:10.3f}"
            for what in ("flops", "bytes accessed")
        ]
        pairs = zip(seconds[kind][1:], seconds["velocity"][1:], strict=True)
        if case[-1]:
            ratios.append(f"{statistics.median(a / b for a, b in pairs):10.3f}")
        print(f"{kind:10}{''.join(ratios)}", flush=True)


def main() -> None:
    """Print the table of training costs for every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=CASES, default=None)
    options = parser.parse_args()
    for name in [options.only] if options.only else CASES:
        table(name, options.rounds)


if __name__ == "__main__":
    main()
