"""Samplers: published steps, exact recursions for Gaussian data, keys, evaluations, refusals.

Every step is linear in x when the data are N(m, S I) and the score is exact, so that mean and
variance of the samples follow from the published formulas written again below in NumPy:

    x ← P x + Q s + √R z,   s = −(x − α m)/v,   v = α² S + σ²
    ⇒   mean ← (P − Q/v) mean + Q α m/v,   variance ← (P − Q/v)² variance + R
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ode import Solver
from operators import scale
from sampling import (
    CORRECTORS,
    PREDICTORS,
    Grid,
    OdeSampler,
    PredictorCorrector,
    ReverseSDE,
    corrector_step,
    denoise,
)
from sde_lib import VESDE, VPSDE, LinearPath, LinearVESDE, SubVPSDE
from toy_data import Mixture

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "samplers.npz"
KINDS = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(0.01, 50.0), "linearve": LinearVESDE(5.0)}
every_kind = pytest.mark.parametrize("kind", KINDS)
END = LinearPath().T

N = 60  # steps; the recursions are exact for any number, and few steps are far from continuous
T_MIN = 0.01
SNR = 0.16
DATA_MEAN = np.asarray([1.5, -0.5])
DATA_VARIANCE = 4.0


# The four diffusions and the discrete chains of N steps, from the published formulas.


def beta(t):
    return 0.1 + 19.9 * t


def integral_beta(t):
    return 0.1 * t + 0.5 * 19.9 * t**2


def last_time(kind):
    return END if kind == "linear" else 1.0


def alpha(kind, t):
    if kind == "linear":
        return 1.0 - t
    return np.exp(-0.5 * integral_beta(t)) if kind in ("vp", "subvp") else 1.0


def sigma(kind, t):
    variance_preserving = 1.0 - np.exp(-integral_beta(t))
    return {
        "vp": np.sqrt(variance_preserving),
        "subvp": variance_preserving,
        "ve": 0.01 * 5000.0**t,
        "linearve": 5.0 * t,
        "linear": t,
    }[kind]


def drift_and_g2(kind, t):
    if kind == "linear":
        return -1.0 / (1.0 - t), 2.0 * t / (1.0 - t)
    return {
        "vp": (-0.5 * beta(t), beta(t)),
        "subvp": (-0.5 * beta(t), beta(t) * (1.0 - np.exp(-2.0 * integral_beta(t)))),
        "ve": (0.0, 2.0 * np.log(5000.0) * (0.01 * 5000.0**t) ** 2),
        "linearve": (0.0, 50.0 * t),
    }[kind]


def prior_std(kind):
    return {"vp": 1.0, "subvp": 1.0, "ve": 50.0, "linearve": 5.0, "linear": END}[kind]


def data_variance_at(kind, t):
    return alpha(kind, t) ** 2 * DATA_VARIANCE + sigma(kind, t) ** 2


def chain_betas(n):
    return np.linspace(0.1 / n, 20.0 / n, n)


def chain_variances(n):
    """σ_{−1}², σ_0², …, σ_{N−1}²."""
    return np.concatenate([[0.0], (0.01 * 5000.0 ** (np.arange(n) / (n - 1))) ** 2])


# Steps as (P, Q, R): x ← P x + Q s + √R z.


def euler_maruyama(kind, t, dt, lmbd=0.0):
    a, g2 = drift_and_g2(kind, t)
    return 1.0 - a * dt, (1.0 - 0.5 * lmbd) * g2 * dt, (1.0 - lmbd) * g2 * dt


def reverse_diffusion(kind, t, dt, i, n, lmbd):
    if kind == "vp":
        b = chain_betas(n)[i]
        return 2.0 - np.sqrt(1.0 - b), (1.0 - 0.5 * lmbd) * b, (1.0 - lmbd) * b
    if kind == "ve":
        gap = np.diff(chain_variances(n))[i]
        return 1.0, (1.0 - 0.5 * lmbd) * gap, (1.0 - lmbd) * gap
    return euler_maruyama(kind, t, dt, lmbd)


def ancestral(kind, i, n):
    if kind == "vp":
        b = chain_betas(n)[i]
        return 1.0 / np.sqrt(1.0 - b), b / np.sqrt(1.0 - b), b
    previous, current = chain_variances(n)[i : i + 2]
    return 1.0, current - previous, previous * (current - previous) / current


def denoising(kind, t):
    return 1.0 / alpha(kind, t), sigma(kind, t) ** 2 / alpha(kind, t), 0.0


@dataclasses.dataclass
class Moments:
    """Mean and variance (per dimension) of the samples, carried through the steps."""

    kind: str
    data_mean: np.ndarray
    mean: np.ndarray
    variance: float

    def update(self, t, p, q, r):
        v = data_variance_at(self.kind, t)
        self.mean = (p - q / v) * self.mean + q * alpha(self.kind, t) * self.data_mean / v
        self.variance = (p - q / v) ** 2 * self.variance + r

    def correct(self, corrector, t, i, n, each, snr):
        factor = 1.0 - chain_betas(n)[i] if self.kind in ("vp", "subvp") else 1.0
        for _ in range(each):
            # langevin: mean‖z‖/mean‖s‖ = v/√variance, for centred data
            v = data_variance_at(self.kind, t)
            size = {"ald": sigma(self.kind, t) ** 2, "langevin": v**2 / self.variance}[corrector]
            epsilon = 2.0 * factor * snr**2 * size
            self.update(t, 1.0, epsilon, 2.0 * epsilon)


def at_the_prior(kind, data_mean=DATA_MEAN):
    return Moments(kind, data_mean, np.zeros(2), prior_std(kind) ** 2)


def after_reverse_sde(start, lmbd, noise_removal, n=N, t_min=T_MIN):
    end = last_time(start.kind)
    dt = (end - t_min) / n
    for k in range(n):
        start.update(end - k * dt, *euler_maruyama(start.kind, end - k * dt, dt, lmbd))
    if noise_removal:
        start.update(t_min, *denoising(start.kind, t_min))
    return start


def after_predictor_corrector(start, sampler):
    """Levels i = N−1, …, 1 of the chain at equidistant times, then t_min."""
    kind, n = start.kind, sampler.num_steps
    dt, lmbd = (1.0 - sampler.t_min) / (n - 1), 1.0 if sampler.probability_flow else 0.0
    for i in reversed(range(n)):
        t = sampler.t_min + i * dt
        if sampler.corrector != "none":
            start.correct(sampler.corrector, t, i, n, sampler.n_steps_each, sampler.snr)
        if i > 0 and sampler.predictor != "none":
            step = {
                "euler_maruyama": lambda t=t: euler_maruyama(kind, t, dt, lmbd),
                "reverse_diffusion": lambda t=t, i=i: reverse_diffusion(kind, t, dt, i, n, lmbd),
                "ancestral_sampling": lambda i=i: ancestral(kind, i, n),
            }[sampler.predictor]()
            start.update(t, *step)
    if sampler.noise_removal:
        start.update(sampler.t_min, *denoising(kind, sampler.t_min))
    return start


def gaussian_score(sde, data_mean=DATA_MEAN):
    """Score of N(m, S I) under `sde`."""
    m = jnp.asarray(data_mean)

    def score(x, t):
        v = sde.alpha(t) ** 2 * DATA_VARIANCE + sde.sigma(t) ** 2
        return scale(-1.0 / v, x - scale(sde.alpha(t), jnp.broadcast_to(m, x.shape)))

    return score


def keys_of(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def draw(sampler, sde, keys, like=None, score=None):
    """Samples, jitted; two-dimensional and of the Gaussian unless told."""
    like = jnp.zeros((len(keys), 2)) if like is None else like
    score = score or gaussian_score(sde)
    run = jax.jit(lambda k, y: sampler(score, sde, k, y))
    return jax.device_get(run(keys, like))


def assert_moments(x, law, errors=4):
    """Sample mean and variance within so many standard errors of the law."""
    n = len(x)
    error = np.sqrt(law.variance / n)
    np.testing.assert_array_less(np.abs(x.mean(axis=0) - law.mean), errors * error)
    error = law.variance * np.sqrt(2.0 / (n - 1))
    np.testing.assert_array_less(np.abs(x.var(axis=0, ddof=1) - law.variance), errors * error)


def starting_at_like(sde):
    """The same diffusion with `like` for the sample at T."""
    cls = type("Fixed", (type(sde),), {"prior_sample": lambda self, keys, like: like})
    return cls(**dataclasses.asdict(sde))


# One step against the published implementation.


@pytest.fixture(scope="module")
def published():
    if not FIXTURE.exists():
        pytest.skip(f"needs {FIXTURE.name}, which is not part of the repository")
    return dict(np.load(FIXTURE, allow_pickle=False))


def explicit_score(x, t):
    """The score of the fixture: −(x_i + a sin(2x_i + t) + b mean x + c x_{i+1} sin x_i)/(1 + t)."""
    time = t[:, None]
    wave = 0.3 * jnp.sin(2.0 * x + time) + 0.1 * x.mean(axis=1, keepdims=True)
    return -(x + wave + 0.2 * jnp.roll(x, -1, axis=1) * jnp.sin(x)) / (1.0 + time)


def assert_published(published, name, step, tolerance=1e-12):
    for value, part in zip(step, ("x", "x_mean"), strict=True):
        expected = published[f"{name}/{part}"]
        error = np.abs(np.asarray(value) - expected).max() / np.abs(expected).max()
        assert error < tolerance, (name, part, error)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize(
    ("predictor", "lmbd"),
    [("euler_maruyama", 0.0), ("reverse_diffusion", 0.0), ("ancestral_sampling", 0.0),
     ("euler_maruyama", 1.0), ("reverse_diffusion", 1.0)],
)  # fmt: skip
def test_predictor_step_is_the_published_one(published, kind, predictor, lmbd):
    x, t = jnp.asarray(published[f"{kind}/x"]), jnp.asarray(published["t"])
    score, z = explicit_score(x, t), jnp.asarray(published["noise"][0])
    np.testing.assert_allclose(score, published[f"{kind}/score"], rtol=1e-13)
    grid = Grid(dt=1 / 1000, num_steps=1000)
    step = PREDICTORS[predictor](score, x, t, z, KINDS[kind], grid, lmbd)
    flow = "_probability_flow" if lmbd else ""
    assert_published(published, f"{kind}/{predictor}{flow}", step)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
@pytest.mark.parametrize("steps", [1, 2])
def test_corrector_step_is_the_published_one(published, kind, corrector, steps):
    x, t = jnp.asarray(published[f"{kind}/x"]), jnp.asarray(published["t"])
    assert float(published["snr"]) == SNR
    for z in jnp.asarray(published["noise"])[:steps]:
        x, mean = corrector_step(
            CORRECTORS[corrector], explicit_score(x, t), x, t, z, KINDS[kind],
            num_steps=1000, snr=SNR,
        )  # fmt: skip
    # The published σ of VP is a first-order expansion at the fixture's t <= 0.0031.
    tolerance = 2e-6 if (kind, corrector) == ("vp", "ald") else 1e-12
    assert_published(published, f"{kind}/{corrector}_n{steps}", (x, mean), tolerance)


# Laws of the samples: the recursions.


@pytest.mark.parametrize(
    ("lmbd", "printed"),
    [(-10.0, 4.011096), (-1.0, 4.005336), (0.0, 4.003296), (0.5, 4.001274), (0.9, 3.997128),
     (1.0, 3.995937)],
)  # fmt: skip
def test_recursion_reproduces_the_table(lmbd, printed):
    """Euler–Maruyama, VP, S = 4, 1000 steps from T to 0, started at variance 1."""
    law = after_reverse_sde(at_the_prior("vp"), lmbd, noise_removal=False, n=1000, t_min=0.0)
    assert law.variance == pytest.approx(printed, abs=6e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("lmbd", "noise_removal"),
    [(-1.0, False), (0.0, False), (0.0, True), (0.5, True), (1.0, False)],
)
def test_reverse_sde_has_the_moments_of_its_recursion(lmbd, noise_removal):
    """n = 20,000: the variance to 1% (s.e.)."""
    sampler = ReverseSDE(N, T_MIN, lmbd, noise_removal)
    x = draw(sampler, KINDS["vp"], keys_of(20_000)).x
    assert_moments(x, after_reverse_sde(at_the_prior("vp"), lmbd, noise_removal))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["subvp", "ve", "linearve", "linear"])
def test_reverse_sde_of_every_diffusion(kind):
    sde = (KINDS | {"linear": LinearPath()})[kind]
    x = draw(ReverseSDE(N, T_MIN, 0.5), sde, keys_of(20_000)).x
    assert_moments(x, after_reverse_sde(at_the_prior(kind), 0.5, noise_removal=True))


@pytest.mark.usefixtures("x64")
def test_reverse_sde_approaches_the_data():
    """500 steps: mean and variance of the data themselves."""
    x = draw(ReverseSDE(500, 1e-4), KINDS["vp"], keys_of(5_000)).x
    assert_moments(x, Moments("vp", DATA_MEAN, DATA_MEAN, DATA_VARIANCE))


@pytest.mark.usefixtures("x64")
@every_kind
@pytest.mark.parametrize(
    "sampler",
    [
        ReverseSDE(N, T_MIN, 1.0),
        ReverseSDE(N, T_MIN, 1.0, noise_removal=False),
        PredictorCorrector("euler_maruyama", "none", N, T_MIN, probability_flow=True),
        PredictorCorrector(
            "reverse_diffusion", "none", N, T_MIN, probability_flow=True, noise_removal=False
        ),
    ],
    ids=["reverse_sde, denoised", "reverse_sde", "euler_maruyama, denoised", "reverse_diffusion"],
)
def test_deterministic_samplers_are_their_recursion_exactly(kind, sampler):
    sde, start = KINDS[kind], np.asarray([[0.3, -1.1], [2.0, 0.0]]) * prior_std(kind)
    x = draw(sampler, starting_at_like(sde), keys_of(2), jnp.asarray(start)).x
    for sample, latent in zip(x, start, strict=True):
        law = Moments(kind, DATA_MEAN, latent, 0.0)
        if isinstance(sampler, ReverseSDE):
            after_reverse_sde(law, 1.0, sampler.noise_removal)
        else:
            after_predictor_corrector(law, sampler)
        np.testing.assert_allclose(sample, law.mean, rtol=1e-10)


PREDICTIONS = [
    (kind, predictor)
    for kind in KINDS
    for predictor in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling")
    if predictor != "ancestral_sampling" or kind in ("vp", "ve")
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "predictor"), PREDICTIONS)
def test_predictors_have_the_moments_of_their_recursion(kind, predictor):
    sampler = PredictorCorrector(predictor, "none", N, T_MIN, noise_removal=False)
    x = draw(sampler, KINDS[kind], keys_of(20_000)).x
    assert_moments(x, after_predictor_corrector(at_the_prior(kind), sampler))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_correctors_have_the_moments_of_their_recursion(kind, corrector):
    """Two steps at each of N levels.

    The batch means of langevin feed back on the variance: over ten seeds it spreads by 0.8 (VP,
    sub-VP) and 1.4 (VE) of the standard error of independent samples.
    """
    sampler = PredictorCorrector(
        "none", corrector, N, T_MIN, snr=SNR, n_steps_each=2, noise_removal=False
    )
    centred = corrector == "langevin"
    data_mean = np.zeros(2) if centred else DATA_MEAN
    score = gaussian_score(KINDS[kind], data_mean)
    x = draw(sampler, KINDS[kind], keys_of(20_000), score=score).x
    law = after_predictor_corrector(at_the_prior(kind, data_mean), sampler)
    assert_moments(x, law, errors=6 if corrector == "langevin" else 4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "predictor", "corrector"),
    [("vp", "reverse_diffusion", "ald"), ("ve", "reverse_diffusion", "langevin"),
     ("subvp", "euler_maruyama", "langevin")],
)  # fmt: skip
def test_predictor_and_corrector_together(kind, predictor, corrector):
    sampler = PredictorCorrector(predictor, corrector, N, T_MIN, snr=SNR)
    data_mean = np.zeros(2) if corrector == "langevin" else DATA_MEAN
    score = gaussian_score(KINDS[kind], data_mean)
    x = draw(sampler, KINDS[kind], keys_of(20_000), score=score).x
    law = after_predictor_corrector(at_the_prior(kind, data_mean), sampler)
    assert_moments(x, law, errors=6 if corrector == "langevin" else 4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("vp", ReverseSDE(2, T_MIN)),
        ("vp", PredictorCorrector("euler_maruyama", "none", 2, T_MIN)),
        ("ve", PredictorCorrector("none", "ald", 2, 0.8, snr=0.5)),
        ("ve", PredictorCorrector("ancestral_sampling", "ald", 3, T_MIN, snr=0.5)),
    ],
    ids=["reverse_sde", "predictor", "corrector", "predictor, corrector"],
)
def test_few_steps_show_that_every_noise_is_independent(kind, sampler):
    """Two steps forget neither the prior nor each other, as many steps would."""
    law = at_the_prior(kind)
    if isinstance(sampler, ReverseSDE):
        after_reverse_sde(law, 0.0, noise_removal=True, n=2)
    else:
        after_predictor_corrector(law, sampler)
    assert_moments(draw(sampler, KINDS[kind], keys_of(20_000)).x, law)


# The ODE and the denoising step.


def ode_map(kind, latent, t_min):
    """α m + (x_T − α_T m) √(v_min/v_T)."""
    end = last_time(kind)
    ratio = np.sqrt(data_variance_at(kind, t_min) / data_variance_at(kind, end))
    return alpha(kind, t_min) * DATA_MEAN + ratio * (latent - alpha(kind, end) * DATA_MEAN)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [*KINDS, "linear"])
def test_ode_sampler_is_the_exact_flow(kind):
    sde = (KINDS | {"linear": LinearPath()})[kind]
    latent = np.random.default_rng(0).standard_normal((3, 2)) * prior_std(kind)
    sampler = OdeSampler(Solver("tsit5", 1e-9, 1e-9), 1e-3, noise_removal=False)
    x = draw(sampler, starting_at_like(sde), keys_of(3), jnp.asarray(latent)).x
    np.testing.assert_allclose(x, ode_map(kind, latent, 1e-3), rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_ode_sampler_converges_as_the_tolerance_falls():
    latent = np.random.default_rng(1).standard_normal((8, 2))
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        sampler = OdeSampler(Solver("tsit5", tolerance, tolerance), 1e-3, noise_removal=False)
        x = draw(sampler, starting_at_like(VPSDE()), keys_of(8), jnp.asarray(latent)).x
        errors.append(np.abs(x - ode_map("vp", latent, 1e-3)).max())
        assert errors[-1] < 50 * tolerance
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.usefixtures("x64")
def test_ode_samples_start_at_the_prior_and_end_with_denoising():
    plain, denoised = (
        draw(OdeSampler(Solver(), 0.2, flag), VPSDE(), keys_of(4_000)) for flag in (False, True)
    )
    variance = data_variance_at("vp", 0.2) / data_variance_at("vp", 1.0)
    law = Moments("vp", DATA_MEAN, ode_map("vp", np.zeros(2), 0.2), variance)
    assert_moments(plain.x, law)
    p, q, _ = denoising("vp", 0.2)
    score = -(plain.x - alpha("vp", 0.2) * DATA_MEAN) / data_variance_at("vp", 0.2)
    np.testing.assert_allclose(denoised.x, p * plain.x + q * score, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(denoised.nfe, plain.nfe + 1)


@pytest.mark.usefixtures("x64")
def test_ode_sample_that_runs_out_of_steps_is_nan():
    sampler = OdeSampler(Solver("tsit5", 1e-6, 1e-6, max_steps=3), 1e-3)
    assert np.isnan(draw(sampler, VPSDE(), keys_of(2)).x).all()


@pytest.mark.usefixtures("x64")
@every_kind
def test_denoising_is_the_posterior_mean(kind):
    """E[x0 | x_t] of a mixture, by Bayes' rule per component."""
    weights, variances = np.asarray([0.3, 0.7]), np.asarray([0.5, 0.2])
    means = np.asarray([[1.0, -1.0], [0.0, 2.0]])
    law = Mixture(jnp.asarray(weights), jnp.asarray(means), jnp.asarray(variances))
    x, times, sde = np.random.default_rng(0).standard_normal((5, 2)), 0.4, KINDS[kind]
    t = jnp.full(5, times)
    result = denoise(lambda x, t: law.score(x, t, sde), sde, jnp.asarray(x), t)
    a, s2 = alpha(kind, times), sigma(kind, times) ** 2
    v = a**2 * variances + s2
    gap = x[:, None] - a * means
    posterior = weights / v * np.exp(-0.5 * (gap**2).sum(axis=2) / v)
    posterior /= posterior.sum(axis=1, keepdims=True)
    components = means + (a * variances / v)[:, None] * gap
    np.testing.assert_allclose(
        result, np.einsum("bk,bkd->bd", posterior, components), rtol=1e-10, atol=1e-12
    )


# Keys, devices, shapes.

INDEPENDENT = {
    "reverse_sde": ReverseSDE(30, T_MIN, -0.5),
    "reverse_diffusion, ald": PredictorCorrector("reverse_diffusion", "ald", 30, T_MIN),
    "ancestral_sampling, none": PredictorCorrector("ancestral_sampling", "none", 30, T_MIN),
    "ode": OdeSampler(Solver("tsit5", 1e-4, 1e-4), T_MIN),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_sample_depends_on_its_key_only(name):
    keys, sampler = keys_of(8), INDEPENDENT[name]
    together = draw(sampler, VPSDE(), keys)
    run = jax.jit(lambda k: sampler(gaussian_score(VPSDE()), VPSDE(), k, jnp.zeros((4, 2))))
    apart = [jax.device_get(run(part)) for part in (keys[:4], keys[4:])]
    np.testing.assert_allclose(together.x, np.concatenate([p.x for p in apart]), rtol=1e-10)
    np.testing.assert_array_equal(together.nfe, np.concatenate([p.nfe for p in apart]))
    assert len(np.unique(together.x)) == 16


@pytest.mark.usefixtures("x64", "four_devices_here")
def test_langevin_does_not_depend_on_the_number_of_devices():
    """The two norms are means over the whole batch."""
    keys, score = keys_of(8), gaussian_score(VPSDE())
    sampler = PredictorCorrector("none", "langevin", 30, T_MIN, axis_name="batch")
    mapped = jax.pmap(
        lambda k: sampler(score, VPSDE(), k, jnp.zeros((4, 2))).x,
        axis_name="batch",
        devices=jax.local_devices()[:2],
    )
    two = np.asarray(mapped(keys.reshape(2, 4))).reshape(8, 2)
    one = draw(dataclasses.replace(sampler, axis_name=None), VPSDE(), keys).x
    np.testing.assert_allclose(two, one, rtol=1e-10)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_images_of_single_precision(name):
    like = jnp.zeros((2, 4, 4, 3), jnp.float32)
    samples = draw(INDEPENDENT[name], VPSDE(), keys_of(2), like, lambda x, t: -x)
    assert samples.x.shape == like.shape
    assert samples.x.dtype == np.float32
    assert np.isfinite(samples.x).all()
    assert samples.nfe.shape == (2,)


# Score evaluations.


def counted(sampler, number=1):
    """(evaluations as reported for each sample, calls of the score)."""
    calls = []

    def score(x, t):
        jax.debug.callback(calls.append, t)
        return -0.2 * x

    nfe = draw(sampler, VPSDE(), keys_of(number), score=score).nfe
    jax.effects_barrier()
    return nfe, len(calls)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (ReverseSDE(5, T_MIN), 6),
        (ReverseSDE(5, 0.0, noise_removal=False), 5),
        (PredictorCorrector("none", "ald", 25, T_MIN, n_steps_each=2, noise_removal=False), 50),
        (PredictorCorrector("euler_maruyama", "langevin", 25, T_MIN, n_steps_each=2), 75),
    ],
    ids=["sde, denoised", "sde", "corrector", "predictor, corrector, denoised"],
)
def test_reported_evaluations_are_the_calls_of_the_score(sampler, expected):
    nfe, calls = counted(sampler, 2)
    np.testing.assert_array_equal(nfe, [expected, expected])
    assert calls == expected


@pytest.mark.parametrize("name", ["tsit5", "heun"])
def test_reported_evaluations_of_the_ode_are_the_calls_of_the_score(name):
    for tolerance in (1e-2, 1e-4):
        nfe, calls = counted(OdeSampler(Solver(name, tolerance, tolerance), T_MIN))
        assert nfe[0] == calls


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral_sampling"])
def test_refuses_a_chain_so_short_that_its_beta_reaches_one(predictor):
    with pytest.raises(ValueError, match=r"model.num_scales=20: .* more than 20.0 steps"):
        draw(PredictorCorrector(predictor, "none", 20, T_MIN), KINDS["vp"], keys_of(2))


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReverseSDE(5, T_MIN, 1.5), "sampling.lmbd=1.5"),
        (lambda: ReverseSDE(5, T_MIN, float("nan")), "sampling.lmbd=nan"),
        (lambda: ReverseSDE(5, 0.0), "sampling.noise_removal"),
        (lambda: ReverseSDE(1, T_MIN), "model.num_scales=1"),
        (lambda: PredictorCorrector("euler", "none", 5, T_MIN), "sampling.predictor='euler'"),
        (lambda: PredictorCorrector("none", "mala", 5, T_MIN), "sampling.corrector='mala'"),
        (
            lambda: PredictorCorrector("none", "none", 5, T_MIN),
            "sampling.predictor='none': need another",
        ),
        (lambda: PredictorCorrector("none", "ald", 5, 0.0), "sampling.noise_removal"),
        (lambda: PredictorCorrector("none", "ald", 1, T_MIN), "model.num_scales=1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("t_min", [-0.1, 0.995, 2.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda t: ReverseSDE(5, t),
        lambda t: PredictorCorrector("none", "ald", 5, t),
        lambda t: OdeSampler(Solver(), t),
    ],
)
def test_refuses_times_outside_those_of_the_sde(make, t_min):
    """The linear path ends at T = 0.9933: steps from T to a later time would go forwards."""
    message = rf"sampling.smallest_time={t_min}: need 0 <=? t < T = 0.993"
    with pytest.raises(ValueError, match=message):
        draw(make(t_min), LinearPath(), keys_of(2))


def test_refuses_the_end_of_the_ode_at_the_data():
    with pytest.raises(ValueError, match=r"sampling.smallest_time=0.0: need 0 < t < T = 1.0"):
        draw(OdeSampler(Solver(), 0.0), KINDS["vp"], keys_of(2))


@pytest.mark.parametrize("kind", ["subvp", "linearve"])
def test_refuses_ancestral_sampling_without_a_chain(kind):
    sampler = PredictorCorrector("ancestral_sampling", "none", 5, T_MIN)
    with pytest.raises(ValueError, match=r"ancestral_sampling.*VPSDE and VESDE have"):
        draw(sampler, KINDS[kind], keys_of(2))


def test_refuses_deterministic_ancestral_sampling():
    with pytest.raises(ValueError, match="probability_flow=False"):
        draw(
            PredictorCorrector("ancestral_sampling", "none", 5, T_MIN, probability_flow=True),
            KINDS["vp"],
            keys_of(2),
        )
