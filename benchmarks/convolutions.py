"""Seconds of the convolutions of a training step, by XLA and by PyTorch.

    python -m benchmarks.convolutions [--config=configs/sdeflow/mnist.py] [--rounds=5]

Every convolution of the network of a config, at its batch size, is timed alone in float32: its
output, the gradient of its input and that of its weights. XLA and PyTorch take turns; the medians
of the rounds are printed, and their sums over all convolutions of a step. PyTorch has its own order
of the axes, [b, c, h, w]. Below stands the whole step of the program. Without PyTorch its columns
are missing.

What a step costs above the sum of XLA's convolutions can be improved here. The sum itself cannot.
"""

import argparse
import collections
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from run_lib import config_files, training
from run_lib.experiment import Experiment

PARTS = ("output", "input", "weights")  # what is computed: y, or a gradient


class Convolution(NamedTuple):
    """Shapes of a convolution: [b, h, w, c] by [h, w, c, d]; the same padding on both sides."""

    x: tuple[int, ...]
    weights: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, also those of inner functions."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in equation.params.values():
            if isinstance(inner, core.ClosedJaxpr):
                yield from equations(inner.jaxpr)
            elif isinstance(inner, core.Jaxpr):
                yield from equations(inner)


def convolutions(experiment: Experiment) -> collections.Counter[Convolution]:
    """Those of one evaluation of the network, with how often each occurs."""
    size = experiment.settings.training.batch_size
    params = jax.eval_shape(lambda: experiment.model.init(jax.random.key(0), experiment.shape))
    x = jax.ShapeDtypeStruct((size, *experiment.shape), jnp.float32)
    t = jax.ShapeDtypeStruct((size,), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x, t: experiment.model.score(p)(x, t))(params, x, t)
    return collections.Counter(
        Convolution(
            equation.invars[0].aval.shape,
            equation.invars[1].aval.shape,
            equation.params["window_strides"],
            equation.params["padding"],
        )
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    )


def by_xla(of: Convolution) -> dict[str, Callable[[], Any]]:
    """Return the functions that run the three parts of a convolution and its gradient."""
    x, weights, pull = (jnp.asarray(a) for a in arrays(of))

    def output(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, weights, of.stride, of.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    @jax.jit
    def of_input(weights: jax.Array, pull: jax.Array) -> Any:
        return jax.linear_transpose(lambda x: output(x, weights), x)(pull)

    @jax.jit
    def of_weights(x: jax.Array, pull: jax.Array) -> Any:
        return jax.linear_transpose(lambda w: output(x, w), weights)(pull)

    forward = jax.jit(output)
    runs = (
        lambda: jax.block_until_ready(forward(x, weights)),
        lambda: jax.block_until_ready(of_input(weights, pull)),
        lambda: jax.block_until_ready(of_weights(x, pull)),
    )
    return dict(zip(PARTS, runs, strict=True))


def by_torch(of: Convolution) -> dict[str, Callable[[], Any]]:
    """The same in PyTorch, on an input that is padded before where both sides are not even."""
    torch = importlib.import_module("torch")
    gradients = importlib.import_module("torch.nn.grad")
    x, weights, pull = arrays(of)
    (top, bottom), (left, right) = of.padding
    even = top == bottom and left == right  # what PyTorch pads by itself
    if not even:
        x = np.pad(x, ((0, 0), *of.padding, (0, 0)))
    options = {"stride": of.stride, "padding": (top, left) if even else 0}
    x = torch.tensor(x.transpose(0, 3, 1, 2).copy())
    weights = torch.tensor(weights.transpose(3, 2, 0, 1).copy())
    pull = torch.tensor(pull.transpose(0, 3, 1, 2).copy())
    runs = (
        lambda: torch.nn.functional.conv2d(x, weights, **options),
        lambda: gradients.conv2d_input(x.shape, weights, pull, **options),
        lambda: gradients.conv2d_weight(x, weights.shape, pull, **options),
    )
    return dict(zip(PARTS, runs, strict=True))


def arrays(of: Convolution) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random input, weights and gradient of the output."""
    rng = np.random.default_rng(0)
    sides = (
        (n + sum(pad) - kernel) // stride + 1
        for n, pad, kernel, stride in zip(
            of.x[1:3], of.padding, of.weights[:2], of.stride, strict=True
        )
    )
    shapes = of.x, of.weights, (of.x[0], *sides, of.weights[3])
    first, second, third = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return first, second, third


def seconds(run: Callable[[], None], repeats: int = 5) -> float:
    """Mean of a few runs."""
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begun) / repeats


def whole_step(experiment: Experiment, rounds: int) -> float:
    """Median seconds of a training step on one batch."""
    with tempfile.TemporaryDirectory() as workdir:
        trainer = training.score_trainer(experiment, Path(workdir))
        _, batch = next(trainer.batches())

        def run() -> None:
            trainer.state, _ = trainer.step_fn(trainer.state, trainer.key, batch)
            jax.block_until_ready(trainer.state)

        run()
        found = statistics.median(seconds(run, 2) for _ in range(rounds))
        trainer.checkpoints.close()
    return found


def main() -> None:
    """Print one line for every kind of convolution, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sdeflow/mnist.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="", help="data.path, with data.dataset=npz")
    options = parser.parse_args()
    config = config_files.load(options.config)
    if options.data:
        config.data.update(dataset="npz", path=options.data)
    experiment = Experiment.from_config(config)
    has_torch = importlib.util.find_spec("torch") is not None
    ways = {"XLA": by_xla} | ({"PyTorch": by_torch} if has_torch else {})
    columns = [f"{way} {part}" for way in ways for part in PARTS]
    sums = dict.fromkeys(columns, 0.0)
    print(f"jax {jax.__version__}, ms\n\n| x | weights | stride | times | {' | '.join(columns)} |")
    print("|---" * (4 + len(columns)) + "|")
    for of, number in convolutions(experiment).items():
        runs = {f"{way} {part}": r for way, make in ways.items() for part, r in make(of).items()}
        for run in runs.values():
            run()
        rounds = [{n: seconds(run) for n, run in runs.items()} for _ in range(options.rounds)]
        each = {name: statistics.median(found[name] for found in rounds) for name in columns}
        for name in columns:
            sums[name] += number * each[name]
        cells = " | ".join(f"{1e3 * each[name]:.2f}" for name in columns)
        print(f"| {of.x} | {of.weights} | {of.stride} | {number} | {cells} |", flush=True)
    cells = " | ".join(f"{1e3 * total:.0f}" for total in sums.values())
    print(f"| all of a step | | | | {cells} |")
    print(f"the whole step: {whole_step(experiment, options.rounds):.3f} s")


if __name__ == "__main__":
    main()
