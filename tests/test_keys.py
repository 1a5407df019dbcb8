"""No key is used twice: whatever draws noise runs under JAX's check of its keys."""

import jax
import jax.numpy as jnp
import pytest

from dequantization import Pixels
from elbo import elbo, published_elbo
from fokker_planck import FokkerPlanck
from high_order import HighOrder
from likelihood import Divergence, discrete_bound, ode_log_likelihood, variational_bound
from losses import mean_loss, score_matching, time_law
from ode import Solver
from parameterization import ScoreModel, unit_time_label
from sampling import OdeSampler, PredictorCorrector, ReverseSDE
from sde_lib import VPSDE
from terms import Terms
from tests.test_losses import GaussianNoise
from time_sampling import Importance

SDE, T_MIN = VPSDE(), 1e-2
PROBED = Divergence("rademacher", 2)
X = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)


def score_fn(x, t):
    return -x * (1.0 + t[:, None])


def keys():
    return jax.random.split(jax.random.key(0), len(X))


def bound(divergence):
    return lambda: variational_bound(
        score_fn, SDE, X, keys(), proposal=Importance(SDE, T_MIN), num_times=3,
        divergence=divergence,
    ).nll  # fmt: skip


def discrete():
    return discrete_bound(
        score_fn, lambda x0, x, t: jnp.zeros_like(t), SDE, X, keys(), distance=0.5,
        proposal=Importance(SDE, T_MIN), num_times=3,
    ).nll  # fmt: skip


def of_elbo(function):
    return lambda: function(score_fn, SDE, X, keys(), num_times=3, divergence=PROBED)


def ode():
    solver = Solver("heun", num_steps=4)
    return ode_log_likelihood(
        score_fn, SDE, X, keys(), t_min=T_MIN, solver=solver, divergence=PROBED
    ).log_p


def sample(sampler):
    return lambda: sampler(score_fn, SDE, keys(), X).x


def loss(terms, **law):
    def run():
        model = ScoreModel(GaussianNoise(SDE, 1.0), SDE, label=unit_time_label)
        law_of_times = time_law(SDE, smallest_time=T_MIN, **law)
        loss_fn = mean_loss(
            score_matching(model, Pixels(16), law_of_times, terms, batch_size=4, train=True)
        )
        batch = {
            "image": jnp.zeros((4, 2), jnp.uint8),
            "noise_id": jnp.arange(4), "mask": jnp.full(4, True), "step": jnp.zeros((), jnp.int32),
        }  # fmt: skip
        params = model.init(jax.random.key(1), (2,))
        return loss_fn(params, jax.random.key(2), batch)[0]

    return run


RUNS = {
    "bound": bound(None),
    "implicit bound": bound(PROBED),
    "discrete bound": discrete,
    "published ELBO": of_elbo(published_elbo),
    "ELBO": of_elbo(elbo),
    "ODE": ode,
    "pc": sample(PredictorCorrector("reverse_diffusion", "langevin", 30, T_MIN, n_steps_each=2)),
    "sde": sample(ReverseSDE(3, T_MIN)),
    "ode": sample(OdeSampler(Solver("heun", num_steps=4), T_MIN)),
    "loss": loss(Terms(objective="ism", num_probes=2), stratified=True),
    "loss of all orders": loss(
        Terms(
            high_order=HighOrder(3, fraction=0.5),
            fokker_planck=FokkerPlanck(alpha=1.0, num_probes=2, every=2),
        ),
        likelihood_weighting=True,
        importance_weighting=True,
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_key_is_used_twice(run):
    with jax.debug_key_reuse(True):
        assert jnp.isfinite(jax.jit(run)()).all()
