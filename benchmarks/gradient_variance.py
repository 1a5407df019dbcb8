"""Variance of the gradient estimate under each law of t, at the parameters of a trained run.

    python -m benchmarks.gradient_variance configs/digits/vp.py --workdir=runs/digits_vp
        [--batches=128] [--batch_size=128]

All laws estimate the gradient of the likelihood-weighted loss ∫ (g²/σ²) R‖e1‖² dt. The masses of
the adaptive law are those of second moments measured on other batches. Printed: the variance of the
estimate of one batch about the law's own mean, E‖G − E G‖²/‖E G‖² with the
reference ‖E G‖² of the importance laws, ± its jackknife standard error, and the same for the loss.
Times near t_min are rare under the uniform law and count most, so its rows have heavy tails: their
errors say so. Dequantisation, noise and examples are those of training; dropout is off.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import losses
from experiments.compare import load
from losses import NUM_BINS, AdaptiveLaw, TimeLaw, bin_moments
from run_lib.experiment import Experiment
from run_lib.loading import load_parameters, steps_in
from run_lib.settings import Settings
from terms import Terms
from time_sampling import Binned, Debias, Importance, Uniform, Velocity

T_EPS = 1e-3


def laws(settings: Settings, moments: jax.Array) -> dict[str, TimeLaw]:
    """Each law with the weight that makes it an estimate of the same integral."""
    sde, t_min = settings.sde, settings.training.smallest_time
    adaptive = AdaptiveLaw(Importance(sde, t_min), losses.noise_weight).at({"time_law": moments})

    def by(
        proposal: Uniform | Importance | Debias | Velocity | Binned, *, stratified: bool
    ) -> TimeLaw:
        def weight(t: jax.Array, sde: Any) -> jax.Array:
            inside = t >= t_min  # the debiased law goes on to 0, the integral does not
            return jnp.where(inside, losses.likelihood_weight(t, sde) / proposal.density(t), 0.0)

        return TimeLaw(proposal, weight, stratified)

    proposals = {
        "uniform": Uniform(sde, t_min),
        "importance": Importance(sde, t_min),
        f"debiased, t_eps {T_EPS:g}": Debias(sde, T_EPS),
        "velocity": Velocity(sde, t_min),
        "adaptive": adaptive.proposal,
    }
    return {
        f"{name}{', stratified' * stratified}": by(proposal, stratified=stratified)
        for name, proposal in proposals.items()
        for stratified in (False, True)
    }


def measured(experiment: Experiment, params: Any) -> jax.Array:
    """ΣE h² and Σ1 of the bins, [2, n], of batches under the importance law, as training learns."""
    settings, model = experiment.settings, experiment.model
    size, t_min = settings.training.batch_size, settings.training.smallest_time
    flat = Binned(settings.sde, t_min, jnp.full((NUM_BINS,), 1.0 / NUM_BINS))
    law = TimeLaw(flat, losses.noise_weight, stratified=True)
    per_example = losses.score_matching(
        model, experiment.encoding, law, Terms(), batch_size=size, train=False
    )

    @jax.jit
    def of_batch(key: jax.Array, batch: dict) -> jax.Array:
        h, _ = per_example(params, key, batch)
        t = law.sample(jax.random.split(key, 5)[1], batch, size)  # as the objective draws them
        return bin_moments(law, t, h).sum(axis=0)

    stream = experiment.dataset.train_batches(batch_size=size, seed=2, first_step=0)
    noise_id = jnp.arange(size)
    found = [of_batch(jax.random.key(k), next(stream) | {"noise_id": noise_id}) for k in range(64)]
    return sum(found)


def variance(samples: np.ndarray, scale: float) -> tuple[float, float]:
    """Unbiased variance of the rows, summed over columns, over `scale`; its jackknife error."""
    n = len(samples)
    squares = ((samples - samples.mean(axis=0)) ** 2).sum(axis=1, dtype=np.float64) / scale
    found = squares.sum() / (n - 1)
    without = (squares.sum() - n / (n - 1) * squares) / (n - 2)
    return found, float(np.sqrt((n - 1) * np.mean((without - without.mean()) ** 2)))


def main() -> None:
    """Print the table of the gradient's variance under each law of t."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=128)
    options = parser.parse_args()
    experiment = Experiment.from_config(load(options.config, []))
    dataset = experiment.dataset
    step = steps_in(options.workdir)[-1]
    params = load_parameters(experiment, options.workdir, step)
    model, encoding = experiment.model, experiment.encoding
    terms = dataclasses.replace(Terms(), reduce_mean=experiment.settings.training.reduce_mean)
    stream = dataset.train_batches(batch_size=options.batch_size, seed=1, first_step=0)
    noise_id = jnp.arange(options.batch_size)
    batches = [next(stream) | {"noise_id": noise_id} for _ in range(options.batches)]
    gradients, values = {}, {}
    moments = measured(experiment, params)
    for name, law in laws(experiment.settings, moments).items():
        per_example = losses.score_matching(
            model, encoding, law, terms, batch_size=options.batch_size, train=False
        )
        step_fn = jax.jit(jax.value_and_grad(losses.mean_loss(per_example), has_aux=True))
        found = [step_fn(params, jax.random.key(k), batch) for k, batch in enumerate(batches)]
        values[name] = np.asarray([float(value) for (value, _), _ in found])
        gradients[name] = np.stack([
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for _, g in found
        ])  # fmt: skip
    precise = [name for name in gradients if name.startswith("importance")]
    scale = float((np.mean([gradients[name].mean(axis=0) for name in precise], axis=0) ** 2).sum())
    center = float(np.mean([values[name].mean() for name in precise]))
    print(
        f"{options.workdir} step {step}: {options.batches} batches of {options.batch_size}, "
        f"loss {center:.4f}"
    )
    print(f"{'law of t':32}{'gradient':>22}{'ratio':>8}{'loss':>22}{'ratio':>8}")
    reference = None
    for name in gradients:
        found = [
            variance(gradients[name], scale),
            variance(values[name][:, None], center**2),
        ]
        reference = reference or found
        columns = (
            f"{f'{spread:.4g} ± {error:.2g}':>22}{spread / first:8.4f}"
            for (spread, error), (first, _) in zip(found, reference, strict=True)
        )
        print(f"{name:32}{''.join(columns)}")


if __name__ == "__main__":
    main()
