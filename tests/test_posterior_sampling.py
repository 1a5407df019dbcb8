"""Posterior sampling against closed forms, in float64.

x0 ~ N(m, C), y = A x0 + γ n      x0 | y ~ N(m', C'),   S = A C Aᵀ + γ² I,
                                  m' = m + C Aᵀ S⁻¹ (y − A m),   C' = C − C Aᵀ S⁻¹ A C
x0 ~ Σ_k w_k N(m_k, v_k I)        a mixture of these, w_k' ∝ w_k N(y; A m_k, S_k), whose
                                  normaliser is p(y)
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from measurements import Denoise, Inpaint, Linear, Measurement
from ode import Solver
from operators import fold_in_each
from posterior_sampling import (
    DiffusionPosteriorSampling,
    Guided,
    MomentMatching,
    Replacement,
    classifier_free,
    classifier_guided,
)
from sampling import Grid, OdeSampler, ReverseSDE
from sde_base import SDE
from sde_lib import VESDE, VPSDE, LinearPath, LinearVESDE, SubVPSDE
from toy_data import Mixture
from twisted import TwistedSampler, combine_evidence, effective_number, systematic

KINDS = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(0.01, 20.0),
    "linearve": LinearVESDE(20.0),
    "linear": LinearPath(),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
D = 4


def linear(noise: float = 0.3, d: int = D, m: int = 2) -> Linear:
    return Linear((d,), noise, np.random.default_rng(3).normal(size=(m, d)) / np.sqrt(d))


def matrix_of(a: Measurement) -> np.ndarray:
    size = int(np.prod(a.shape))
    columns = a.forward(jnp.eye(size).reshape(size, *a.shape))
    return np.asarray(columns).reshape(size, -1).T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """N(m, C) with any covariance."""

    mean: jax.Array
    covariance: jax.Array

    def at(self, t: jax.Array, sde: SDE) -> tuple[jax.Array, jax.Array]:
        """Mean and covariance of x_t, for one t."""
        eye = jnp.eye(len(self.mean))
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return alpha * self.mean, alpha**2 * self.covariance + sigma**2 * eye

    def score(self, x: jax.Array, t: jax.Array, sde: SDE) -> jax.Array:
        def one(x: jax.Array, t: jax.Array) -> jax.Array:
            mean, covariance = self.at(t, sde)
            return jnp.linalg.solve(covariance, mean - x)

        return jax.vmap(one)(x, t)

    def given(self, a: Measurement, y: jax.Array) -> tuple["Gaussian", float]:
        """(law given y, log p(y))."""
        A = jnp.asarray(matrix_of(a))
        S = A @ self.covariance @ A.T + a.noise**2 * jnp.eye(len(A))
        gain = self.covariance @ A.T @ jnp.linalg.inv(S)
        law = Gaussian(
            self.mean + gain @ (y - A @ self.mean), self.covariance - gain @ A @ self.covariance
        )
        return law, multivariate_normal.logpdf(y, A @ self.mean, S)


def gaussian(d: int = D) -> Gaussian:
    root = np.random.default_rng(4).normal(size=(d, d)) / np.sqrt(d)
    return Gaussian(jnp.linspace(-1.0, 1.0, d), jnp.asarray(root @ root.T + 0.1 * np.eye(d)))


def mixture_given(
    law: Mixture, a: Measurement, y: jax.Array
) -> tuple[np.ndarray, list[Gaussian], float]:
    """(weights, components, log p(y)) of x0 given y."""
    parts, logs = [], []
    for weight, mean, variance in zip(law.weights, law.means, law.variances, strict=True):
        prior = Gaussian(mean, variance * jnp.eye(len(mean)))
        part, log_p = prior.given(a, y)
        parts.append(part)
        logs.append(jnp.log(weight) + log_p)
    logs = np.asarray(logs)
    return np.asarray(jax.nn.softmax(logs)), parts, float(jax.nn.logsumexp(logs))


def score_of(law: Mixture | Gaussian, sde: SDE) -> Callable:
    return lambda x, t: law.score(x, t, sde)


@every_kind
@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_moment_matching_is_exact_for_gaussian_data(kind: str, t: float, x64: None) -> None:
    sde, law, a = KINDS[kind], gaussian(), linear()
    x = 2.0 * jax.random.normal(jax.random.key(0), (3, D))
    y, times = jnp.asarray([[0.5, -1.0]] * 3), jnp.full((3,), t)
    guide = MomentMatching(a, y)
    found = jax.jit(lambda x, t: guide(score_of(law, sde), sde, x, t))(x, times)
    posterior, log_p = law.given(a, y[0])
    expected = posterior.score(x, times, sde)
    np.testing.assert_allclose(found.score + found.guidance, expected, rtol=1e-10, atol=1e-10)
    mean, covariance = posterior.at(times[0], sde)
    given_y = multivariate_normal.logpdf(x, mean[None], covariance[None])
    mean, covariance = law.at(times[0], sde)
    log_likelihood = log_p + given_y - multivariate_normal.logpdf(x, mean[None], covariance[None])
    np.testing.assert_allclose(found.log_likelihood, log_likelihood, rtol=1e-10, atol=1e-9)


def test_row_sums_are_exact_where_the_covariance_is_diagonal(x64: None) -> None:
    sde = VPSDE()
    law = Mixture(jnp.ones(1), jnp.ones((1, 2, 3)), jnp.full(1, 0.5))
    a = Inpaint((2, 3), 0.2, np.asarray([[True, False, False], [False, True, True]]))
    x, y = jax.random.normal(jax.random.key(0), (5, 2, 3)), jnp.ones((5, 3))
    t = jnp.linspace(0.1, 0.9, 5)
    guides = [MomentMatching(a, y, covariance) for covariance in ("exact", "row_sums")]
    both = jax.jit(lambda x, t: [g(score_of(law, sde), sde, x, t) for g in guides])(x, t)
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_any_sampler_takes_the_guided_score(x64: None) -> None:
    sde, law, a = VPSDE(), gaussian(), linear()
    number = 2000
    y = jnp.tile(jnp.asarray([[0.5, -1.0]]), (number, 1))
    score = MomentMatching(a, y).guided(score_of(law, sde), sde)
    keys = fold_in_each(jax.random.key(5), jnp.arange(number))
    sampler = OdeSampler(Solver("dopri5", 1e-5, 1e-5), 1e-3)
    x = np.asarray(sampler(score, sde, keys, jnp.zeros((number, D))).x)
    posterior, _ = law.given(a, y[0])
    covariance = np.asarray(posterior.covariance)
    standard_error = np.sqrt(np.diag(covariance) / number)
    assert np.all(np.abs(x.mean(axis=0) - posterior.mean) < 4.0 * standard_error)
    scatter = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) * 2.0 / number)
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4.0 * scatter + 1e-3)


# Twisted sequential Monte Carlo.


def three_modes(d: int) -> Mixture:
    means = np.random.default_rng(7).normal(size=(3, d))
    return Mixture(jnp.asarray([0.5, 0.3, 0.2]), jnp.asarray(means), jnp.asarray([0.05, 0.1, 0.2]))


@jax.jit
def responsibilities(x: jax.Array, weights: np.ndarray, parts: list[Gaussian]) -> jax.Array:
    """P(component | x) under the posterior mixture, for x: [..., d]."""
    flat = x.reshape(-1, x.shape[-1])
    logs = [multivariate_normal.logpdf(flat, p.mean[None], p.covariance[None]) for p in parts]
    shares = jax.nn.softmax(jnp.stack(logs, axis=-1) + jnp.log(weights)[None], axis=-1)
    return shares.reshape(*x.shape[:-1], len(parts))


@pytest.mark.parametrize(
    ("kind", "d", "m", "covariance"),
    [("ve", 2, 1, "exact"), ("vp", 8, 3, "exact"), ("linear", 4, 2, "row_sums")],
)
def test_twisted_particles_have_the_weights_of_the_modes_and_the_evidence(
    kind: str, d: int, m: int, covariance: str, x64: None
) -> None:
    sde, law, a, runs = KINDS[kind], three_modes(d), linear(0.2, d, m), 16
    y = a.draw(law.sample(jax.random.key(3), 1), fold_in_each(jax.random.key(4), jnp.arange(1)))
    weights, parts, log_p = mixture_given(law, a, y[0])
    sampler = TwistedSampler(a, jnp.repeat(y, runs, axis=0), 200, 1e-3, 256, covariance)
    keys = fold_in_each(jax.random.key(5), jnp.arange(runs))
    run = jax.jit(lambda keys: sampler.run(score_of(law, sde), sde, keys, jnp.zeros((runs, d))))
    found = run(keys)

    evidence, error = combine_evidence(found.log_evidence)
    assert error < 0.02
    assert abs(evidence - log_p) < min(0.05, 3.0 * error + 0.01)  # 0.01: 200 levels

    shares = responsibilities(found.x, weights, parts)
    each = jnp.sum(jax.nn.softmax(found.log_weights, axis=1)[..., None] * shares, axis=1)
    error = each.std(axis=0, ddof=1) / np.sqrt(runs)
    assert np.all(np.abs(each.mean(axis=0) - weights) < 3.0 * error + 0.002)
    assert float(found.smallest_ess.min()) > 64


def evidence_of_levels(
    law: Gaussian, a: Measurement, y: jax.Array, sde: SDE, times: jax.Array
) -> float:
    """log p(y) of the model of these levels, whose steps are linear for Gaussian data.

    x_s = (x_t + q s(x_t))/c + √v n, and at the end y = A x̂ + N(0, γ² I + A V Aᵀ).
    """
    eye = jnp.eye(len(law.mean))
    mean, covariance = jnp.zeros_like(law.mean), sde.prior_std**2 * eye
    for t, s in itertools.pairwise(times):
        c = sde.alpha(t) / sde.alpha(s)
        q = sde.sigma(t) ** 2 - c**2 * sde.sigma(s) ** 2
        centre, spread = law.at(t, sde)
        step = (eye - q * jnp.linalg.inv(spread)) / c
        mean = step @ mean + q * jnp.linalg.solve(spread, centre) / c
        covariance = step @ covariance @ step.T + q * sde.sigma(s) / sde.sigma(t) * eye
    alpha, variance = sde.alpha(times[-1]), sde.sigma(times[-1]) ** 2
    centre, spread = law.at(times[-1], sde)
    jacobian = (eye - variance * jnp.linalg.inv(spread)) / alpha
    mean = jacobian @ mean + variance * jnp.linalg.solve(spread, centre) / alpha
    covariance = jacobian @ covariance @ jacobian.T + variance / alpha * jacobian
    A = jnp.asarray(matrix_of(a))
    noise = a.noise**2 * jnp.eye(len(A))
    return float(multivariate_normal.logpdf(y, A @ mean, A @ covariance @ A.T + noise))


@pytest.mark.parametrize("covariance", ["exact", "row_sums"])
def test_the_evidence_is_unbiased_however_few_the_particles(covariance: str, x64: None) -> None:
    sde, law, a, runs = VPSDE(), gaussian(2), linear(0.3, 2, 2), 2000
    y = jnp.tile(jnp.asarray([[0.3, -0.4]]), (runs, 1))
    sampler = TwistedSampler(a, y, 20, 1e-2, 3, covariance)
    like = jnp.zeros((runs, 2))
    found = sampler.run(score_of(law, sde), sde, keys_of(runs), like)
    evidence, error = combine_evidence(found.log_evidence)
    expected = evidence_of_levels(law, a, y[0], sde, sampler._times(sde, like))
    assert error < 0.03
    assert abs(evidence - expected) < 3.0 * error


def keys_of(number: int) -> jax.Array:
    return fold_in_each(jax.random.key(5), jnp.arange(number))


def test_systematic_resampling_takes_each_particle_by_its_share(x64: None) -> None:
    weights = jnp.asarray([0.5, 0.25, 0.2, 0.05])
    draws = jax.vmap(lambda key: systematic(key, jnp.log(weights)))(keys_of(4000))
    counts = jax.vmap(lambda d: jnp.bincount(d, length=4))(draws)
    counts = counts.astype(jnp.float64)
    assert jnp.all(jnp.abs(counts - 4.0 * weights[None]) < 1.0 + 1e-12)
    assert jnp.all(jnp.abs(counts.mean(axis=0) - 4.0 * weights) < 4.0 * 0.5 / np.sqrt(4000))
    ess = effective_number(jnp.log(jnp.stack([weights, jnp.full(4, 0.25)])))
    np.testing.assert_allclose(ess, [1.0 / float(jnp.sum(weights**2)), 4.0])


# What the other methods are wrong by. Two modes, of which y makes one a hundred times less likely.


def two_modes() -> tuple[Mixture, Inpaint, jax.Array]:
    means = jnp.asarray([[-1.0, -1.0], [1.0, 1.0]])
    law = Mixture(jnp.full(2, 0.5), means, jnp.full(2, 0.1))
    return law, Inpaint((2,), 0.05, np.asarray([False, True])), jnp.asarray([[0.25]])


def share_of_the_wrong_mode(method: str, number: int = 1000) -> float:
    law, a, one = two_modes()
    sde, y, steps = VPSDE(), jnp.repeat(one, number, axis=0), 100
    pc = {"predictor": "euler_maruyama", "corrector": "none", "num_steps": steps, "t_min": 1e-3}
    sampler = {
        "replacement": lambda: Replacement(**pc, measurement=a, y=y),
        "dps": lambda: DiffusionPosteriorSampling(**pc, measurement=a, y=y),
        "moment_matching": lambda: Guided(ReverseSDE(steps, 1e-3), MomentMatching(a, y)),
        "twisted": lambda: TwistedSampler(a, y, steps, 1e-3, 16),
    }[method]()
    x = sampler(score_of(law, sde), sde, keys_of(number), jnp.zeros((number, 2))).x
    weights, parts, _ = mixture_given(law, a, one[0])
    return float(responsibilities(x, weights, parts)[:, 0].mean())


def test_three_methods_are_biased_and_the_fourth_much_less(x64: None) -> None:
    law, a, y = two_modes()
    weights, _, _ = mixture_given(law, a, y[0])
    assert weights[0] < 0.01
    found = {
        name: share_of_the_wrong_mode(name)
        for name in ("replacement", "dps", "moment_matching", "twisted")
    }
    error = np.sqrt(0.25 / 1000)
    assert found["replacement"] > 0.2  # 0.30: it sees y through the score alone
    assert found["moment_matching"] > 0.1  # 0.18: p(y | x_t) is not Gaussian where modes part
    assert found["dps"] > weights[0] + 4.0 * error  # of 100 steps; that of 1000 is smaller
    error = np.sqrt(weights[0] * (1.0 - weights[0]) / 1000)
    assert found["twisted"] < weights[0] + 4.0 * error, found


def test_replacement_ends_with_y_in_its_place(x64: None) -> None:
    law, a, y = two_modes()
    y, sde = jnp.repeat(y, 5, axis=0), VPSDE()
    sampler = Replacement("euler_maruyama", "langevin", 30, 1e-3, measurement=a, y=y)
    x = sampler(score_of(law, sde), sde, keys_of(5), jnp.zeros((5, 2))).x
    np.testing.assert_allclose(a.forward(x), y, rtol=1e-12)


@every_kind
def test_the_measured_part_has_the_noise_of_the_level_that_x_is_at(kind: str, x64: None) -> None:
    sde, number, a = KINDS[kind], 4000, linear(0.0, 3, 2)
    y, x = jnp.tile(jnp.asarray([[0.5, -1.0]]), (number, 1)), jnp.zeros((number, 3))
    sampler = Replacement("euler_maruyama", "none", 30, 1e-3, measurement=a, y=y)
    t, grid = jnp.full(number, 0.5), Grid(0.1, 30)
    after = sampler.predict(score_of(gaussian(3), sde), sde, keys_of(number), x, t, grid)
    t, A = jnp.asarray(0.4), matrix_of(a)
    found, covariance = np.asarray(a.forward(after)), np.asarray(sde.sigma(t) ** 2) * A @ A.T
    error = np.sqrt(np.diag(covariance) / number)
    assert np.all(np.abs(found.mean(axis=0) - sde.alpha(t) * y[0]) < 4.0 * error)
    error = np.sqrt(2.0 * np.outer(np.diag(covariance), np.diag(covariance)) / number)
    assert np.all(np.abs(np.cov(found.T) - covariance) < 4.0 * error)


def test_replacement_is_exact_where_nothing_depends_on_y(x64: None) -> None:
    # The coordinates are independent: the others must keep the law of a sampler of p(x).
    sde, number = VESDE(0.01, 20.0), 3000
    law = Mixture(jnp.ones(1), jnp.asarray([[1.0, -2.0]]), jnp.full(1, 0.5))
    a = Inpaint((2,), 0.0, np.asarray([False, True]))
    pc = {"predictor": "reverse_diffusion", "corrector": "none", "num_steps": 200, "t_min": 1e-3}
    sampler = Replacement(**pc, measurement=a, y=jnp.zeros((number, 1)))
    x = sampler(score_of(law, sde), sde, keys_of(number), jnp.zeros((number, 2))).x[:, 1]
    assert abs(float(x.mean()) + 2.0) < 4.0 * np.sqrt(0.5 / number)
    assert abs(float(x.var()) - 0.5) < 4.0 * 0.5 * np.sqrt(2.0 / number) + 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda a, y: MomentMatching(dataclasses.replace(a, noise=0.0), y),
            r"sampling\.noise=0\.0",
        ),
        (lambda a, y: MomentMatching(a, y, "all"), r"covariance='all': allowed"),
        (lambda a, y: TwistedSampler(a, y, 10, 1e-3, 1), r"sampling\.particles=1: need at least 2"),
        (lambda a, y: TwistedSampler(a, y, 1, 1e-3, 2), r"model\.num_scales=1: need at least 2"),
        (
            lambda a, y: Replacement(
                "euler_maruyama", "none", 9, 1e-3, measurement=Denoise((2,), 0.1), y=y
            ),
            r"sampling\.task_method='replacement': need another",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(make: Callable, message: str) -> None:
    a = Inpaint((2,), 0.05, np.asarray([False, True]))
    with pytest.raises(ValueError, match=message):
        make(a, jnp.zeros((1, 1)))


# Guidance by a class.


@every_kind
def test_the_score_and_the_gradient_of_a_true_classifier_are_the_score_of_the_class(
    kind: str, x64: None
) -> None:
    sde, law = KINDS[kind], three_modes(3)
    x, t = jax.random.normal(jax.random.key(1), (4, 3)), jnp.asarray([0.1, 0.3, 0.6, 0.9])

    def log_prob(x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(law.log_components(x, t, sde), axis=1)[:, 1]

    of_class = Mixture(jnp.ones(1), law.means[1:2], law.variances[1:2])
    found = classifier_guided(score_of(law, sde), log_prob, 1.0)(x, t)
    np.testing.assert_allclose(found, of_class.score(x, t, sde), rtol=1e-8, atol=1e-8)

    both = score_of(of_class, sde), score_of(law, sde)
    for weight, expected in ((0.0, both[1](x, t)), (1.0, both[0](x, t))):
        np.testing.assert_allclose(classifier_free(*both, weight)(x, t), expected, rtol=1e-12)
    by_gradient = classifier_guided(both[1], log_prob, 2.5)(x, t)
    np.testing.assert_allclose(classifier_free(*both, 2.5)(x, t), by_gradient, rtol=1e-7, atol=1e-7)
