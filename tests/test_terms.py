"""Terms alone and together: same values however they are combined, shared or sampled."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import losses
from dequantization import Reals
from fokker_planck import FokkerPlanck, advective_residual, scalar_term
from high_order import HighOrder, second_order_residual, third_order_residual
from models import MODELS
from operators import (
    PROBES,
    fold_in_all,
    fold_in_each,
    standard_normal,
    value_hvp_and_directional,
)
from parameterization import HEADS, PARAMETERIZATIONS, TIME_LABELS, HeadModel, ScoreModel
from sde_lib import SDES, VPSDE
from terms import Point, Terms

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

SDE = VPSDE()


def score_fn(x, t):
    """Neither a gradient nor the score of anything."""
    turned = 0.2 * jnp.roll(x, -1, 1) * jnp.sin(x)
    return -(x + 0.3 * jnp.sin(2.0 * x + t[:, None]) + turned) / (1.0 + t)[:, None]


def a_point(number=12, d=3, t=None):
    rng = np.random.default_rng(0)
    x0, z = (jnp.asarray(rng.standard_normal((number, d))) for _ in range(2))
    t = jnp.asarray(rng.uniform(0.1, 0.9, number)) if t is None else jnp.full((number,), t)
    return Point(SDE.perturb(x0, t, z), t, z, jax.random.split(jax.random.key(0), number))


def parts(point=None, **fields):
    return Terms(**fields).parts(score_fn, SDE, point or a_point())


def check(found, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-12, err_msg=name)


VECTOR = {"alpha": 1.0, "beta": 1.0}
COMBINATIONS = list(itertools.product(
    ["dsm", "ism"], [2, 3], ["gradient", "directional"], ["gradient", "advective"], [1, 2]
))  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("objective", "order", "third", "form", "probes"), COMBINATIONS)
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_terms_have_the_same_values_together_as_alone(
    estimator, objective, order, third, form, probes
):
    """Whatever sweeps are shared, and for different numbers of probes of the terms."""
    high = HighOrder(order, third_order_form=third)
    residual = FokkerPlanck(**VECTOR, form=form, num_probes=probes)
    num_probes = 3 - probes if estimator == "probe" else 1
    options = {"estimator": estimator, "num_probes": num_probes}
    together = parts(objective=objective, high_order=high, fokker_planck=residual, **options)
    check(together, parts(high_order=high, **options))
    check(together, parts(fokker_planck=residual))
    check(together, parts(objective=objective, **options))
    names = ["dsm", "frobenius", "trace", "fp", "fp_scalar"]
    names += ["third"] * (order == 3) + ["ism"] * (objective == "ism")
    assert sorted(together) == sorted(names)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduce_mean", [True, False])
def test_implicit_and_denoising_score_matching_have_the_same_mean(reduce_mean):
    """Over z at fixed x0 and t, for a score that is no gradient, within 4 standard errors."""
    n = 60_000
    z = jax.random.normal(jax.random.key(1), (n, 3), jnp.float64)
    t, x0 = jnp.full((n,), 0.2), jnp.broadcast_to(jnp.asarray([0.5, -1.0, 0.2]), (n, 3))
    point = Point(SDE.perturb(x0, t, z), t, z, jax.random.split(jax.random.key(2), n))
    for estimator in ("probe", "exact"):
        found = parts(point, objective="ism", reduce_mean=reduce_mean, estimator=estimator)
        gap = found["ism"] - found["dsm"]
        assert abs(float(gap.mean())) < 4 * float(gap.std()) / n**0.5
        assert float(gap.std()) / n**0.5 < 0.02 * float(found["dsm"].mean())


@pytest.mark.usefixtures("x64")
def test_two_fractions_take_each_n_th_example_and_keep_the_mean():
    high, residual = HighOrder(2), FokkerPlanck(alpha=1.0)
    whole = parts(high_order=high, fokker_planck=residual)
    found = parts(
        high_order=dataclasses.replace(high, fraction=1 / 2),
        fokker_planck=dataclasses.replace(residual, fraction=1 / 3),
    )
    rows = np.arange(12)
    check(found, {"dsm": whole["dsm"]})
    for name, n in (("frobenius", 2), ("trace", 2), ("fp", 3)):
        expected = np.where(rows % n == 0, n * np.asarray(whole[name]), 0.0)
        check(found, {name: expected})


@pytest.mark.usefixtures("x64")
def test_evaluation_takes_every_term_of_every_example():
    terms = Terms(
        high_order=HighOrder(3, fraction=1 / 2),
        fokker_planck=FokkerPlanck(alpha=1.0, fraction=1 / 4, every=7),
    )
    check(
        terms.everywhere().parts(score_fn, SDE, a_point()),
        parts(high_order=HighOrder(3), fokker_planck=FokkerPlanck(alpha=1.0)),
    )


@pytest.mark.usefixtures("x64")
def test_probes_of_the_same_number_give_different_examples_different_terms():
    point = a_point()
    same = Point(*(jnp.broadcast_to(part[:1], part.shape) for part in point[:3]), point.keys)
    assert len(np.unique(parts(same, high_order=HighOrder(2))["trace"])) > 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("m", "weight"), [*itertools.product([1.0, 2.0, 3.0], ["constant", "ll"])])
def test_exponent_weight_and_coefficients_take_effect(m, weight):
    point = a_point()
    residual = FokkerPlanck(alpha=0.3, beta=0.7, m=m, weight=weight)
    found = parts(point, fokker_planck=residual)
    square = parts(point, fokker_planck=FokkerPlanck(**VECTOR))
    check(found, {name: square[name] ** (m / 2) for name in ("fp", "fp_scalar")})
    w = {"constant": 1.0, "ll": SDE.g2(point.t)}[weight]
    expected = 2.0 * found["dsm"] + 5.0 * w * (0.3 * found["fp"] + 0.7 * found["fp_scalar"])
    ones = jnp.ones(12)
    total = Terms(fokker_planck=residual).weighted(found, SDE, point.t, 2.0 * ones, 5.0 * ones)
    np.testing.assert_allclose(total, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_published_weights():
    t = jnp.asarray([0.2, 0.7])
    weigh = lambda name: FokkerPlanck(alpha=1.0, weight=name).weighted(  # noqa: E731
        {"fp": jnp.ones(2)}, t, SDE
    )
    np.testing.assert_allclose(weigh("constant"), 1.0)
    np.testing.assert_allclose(weigh("convention"), jnp.sqrt(0.1 + 19.9 * t), rtol=1e-12)
    np.testing.assert_allclose(weigh("ll"), 0.1 + 19.9 * t, rtol=1e-12)
    for m in (1.0, 2.0, 3.0):  # eps in units of g²/2σ³, L in units of g²/2σ²
        terms = FokkerPlanck(alpha=1.0, beta=10.0, weight="dimensionless", m=m)
        found = terms.weighted({"fp": jnp.ones(2), "fp_scalar": jnp.ones(2)}, t, SDE)
        units = 2.0 * SDE.sigma(t) ** 2 / SDE.g2(t)
        np.testing.assert_allclose(found, (units * SDE.sigma(t)) ** m + 10.0 * units**m, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("law", [0, 2, 3])
def test_the_whole_loss_is_the_weighted_sum_of_its_formulas(law):
    """Every coefficient and weight distinct, two probes of the residual, each law of t."""
    sde, t_min = SDE, 0.05
    law = losses.time_law(sde, smallest_time=t_min, **LAWS[law])
    high = HighOrder(
        3, second_order_weight=0.3, trace_weight=0.7, third_order_weight=0.2,
        third_order_form="directional",
    )  # fmt: skip
    residual = FokkerPlanck(alpha=0.4, beta=0.6, weight="ll", form="advective", num_probes=2)
    terms = Terms(objective="ism", high_order=high, fokker_planck=residual)
    model = FieldModel(MODELS["mlp"](), sde)
    ids = jnp.arange(6)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
    batch = {"image": image, "noise_id": ids, "mask": ids >= 0}
    per_example = losses.score_matching(model, Reals(), law, terms, batch_size=6, train=False)
    rng = jax.random.key(3)
    values, _ = per_example({}, rng, batch)

    _, key_time, key_noise, _, key_probe = jax.random.split(rng, 5)
    t = law.sample(key_time, batch, 6, image.dtype)
    z = standard_normal(fold_in_each(key_noise, ids), image)
    x, sigma, d = sde.perturb(image, t, z), sde.sigma(t), 3
    keys = fold_in_each(key_probe, ids)
    v, w = (PROBES["rademacher"](fold_in_all(keys, i), x) for i in range(2))
    assert float(jnp.abs(v - w).max()) > 0
    field = lambda y: score_fn(y, t)  # noqa: E731
    s, hv, third = value_hvp_and_directional(field, x, v)
    e1 = sigma[:, None] * s + z
    ism = (sigma**2 * ((s**2).sum(1) + 2.0 * (v * hv).sum(1)) + d) / d
    a_v = second_order_residual(e1, hv, v, sigma)
    c = third_order_residual(e1, hv, third, v, sigma)
    orders = 0.3 * ((a_v**2).sum(1) + 0.7 * (v * a_v).sum(1) ** 2) / d**2
    orders = ism + orders + 0.2 * (c**2).sum(1) / d**3
    one, two = (advective_residual(score_fn, sde, x, t, u) for u in (v, w))
    scalars = [scalar_term(r.score, r.hv, x, t, u, sde) for r, u in ((one, v), (two, w))]
    square = 0.4 * (one.residual * two.residual).sum(1) / d + 0.6 * scalars[0] * scalars[1] / d**2
    to_uniform = 1.0 / (law.proposal.density(t) * law.proposal.length)
    expected = law.weight(t, sde) * orders + to_uniform * sde.g2(t) * square
    np.testing.assert_allclose(values, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("scalar_fp", "names"),
    [("True", ["fp_scalar"]), ("False", ["fp"]), ("both", ["fp", "fp_scalar"])],
)
def test_scalar_fp_chooses_the_terms(scalar_fp, names):
    residual = FokkerPlanck(**VECTOR, scalar_fp=scalar_fp)
    assert residual.names == names
    assert set(parts(fokker_planck=residual)) == {"dsm", *names}


def test_a_fraction_of_the_examples_keeps_their_own_score():
    """With a score that differs by example, as given a context, parts are those of the whole."""
    sde, n = SDE, 6
    factors = jnp.linspace(0.5, 2.0, n)
    score_of = lambda rows: lambda x, t: factors[rows][:, None] * score_fn(x, t)  # noqa: E731
    rng = np.random.default_rng(0)
    x, z = (jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for _ in range(2))
    keys = jax.random.split(jax.random.key(0), n)
    point = Point(x, jnp.full(n, 0.5), z, keys)
    terms = Terms(high_order=HighOrder(2, fraction=0.5))
    some = terms.parts(score_of(slice(None)), sde, point, score_of)
    whole = terms.everywhere().parts(score_of(slice(None)), sde, point, score_of)
    np.testing.assert_allclose(some["dsm"], whole["dsm"], rtol=1e-6)
    for name in ("frobenius", "trace"):
        np.testing.assert_allclose(some[name][::2], 2.0 * whole[name][::2], rtol=1e-5)
        np.testing.assert_array_equal(some[name][1::2], 0.0)


class FieldModel(ScoreModel):
    """A model whose score is `score_fn`, whatever the parameters."""

    def score(self, params, dropout_key=None, *, context=None):
        del params, dropout_key
        return score_fn


class Batch:
    """A tiny model and a batch for whole losses."""

    def __init__(self, sde, shape, parameterization="noise", **fields):
        network = {"hidden": 8, "depth": 1, "embed_dim": 8, "dropout": 0.5} | fields
        labels, mlp = TIME_LABELS["log_snr"], MODELS["mlp"](**network)
        if parameterization in HEADS:
            levels = (40, -1.0, 1.0) if parameterization in ("cells", "atoms") else ()
            head = HEADS[parameterization](*levels)
            self.model = HeadModel(mlp.clone(outputs=head.outputs), sde, label=labels, head=head)
        else:
            self.model = ScoreModel(mlp, sde, PARAMETERIZATIONS[parameterization], labels)
        self.params = self.model.init(jax.random.key(0), shape)
        self.sde = sde
        image = np.random.default_rng(0).standard_normal((8, *shape))
        self.batch = {
            "image": jnp.asarray(image, jnp.float32),
            "noise_id": jnp.arange(8),
            "mask": jnp.ones(8, bool),
        }

    def value_and_grad(self, terms, *, train=True, t_min=1e-5, step=0, **switches):
        law = losses.time_law(self.sde, smallest_time=t_min, **switches)
        per_example = losses.score_matching(
            self.model, Reals(), law, terms, batch_size=8, train=train
        )
        loss_fn = jax.value_and_grad(losses.mean_loss(per_example), has_aux=True)
        moments = jnp.stack([jnp.geomspace(1.0, 100.0, losses.NUM_BINS), jnp.ones(losses.NUM_BINS)])
        batch = self.batch | {"step": jnp.asarray(step), "time_law": moments}
        return jax.jit(loss_fn)(self.params, jax.random.key(1), batch)


LAWS = [
    {}, {"likelihood_weighting": True},
    {"likelihood_weighting": True, "importance_weighting": True}, {"debias": True},
    {"likelihood_weighting": True, "name": "velocity"},
    {"likelihood_weighting": True, "name": "adaptive"},
]  # fmt: skip


SHAPES = [(2,), (2, 2, 1), (1,), (3,)]
CHOICES = list(
    zip(*map(itertools.cycle, (SDES, LAWS, SHAPES)), PARAMETERIZATIONS | HEADS, strict=False)
)  # fmt: skip


@pytest.mark.parametrize(("name", "law", "shape", "parameterization"), CHOICES)
def test_everything_composes(name, parameterization, law, shape):
    """Order 3, ism, residual with two probes, fractions and dropout, one of each kind in turn."""
    tiny = Batch(SDES[name](), shape, parameterization)
    terms = Terms(
        objective="ism",
        high_order=HighOrder(3, third_order_form="directional", fraction=1 / 2),
        fokker_planck=FokkerPlanck(
            **VECTOR, weight="dimensionless", form="advective", num_probes=2, fraction=1 / 4
        ),
    )
    (loss, metrics), grads = tiny.value_and_grad(terms, t_min=1e-3, stratified=True, **law)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    names = {"loss", "dsm", "ism", "frobenius", "trace", "third", "fp", "fp_scalar"}
    assert set(metrics) - {"time_law"} == names


@pytest.mark.parametrize("every", [1, 3])
def test_the_residual_is_taken_at_each_n_th_step_times_n(every):
    tiny, residual = Batch(SDE, (2,)), FokkerPlanck(alpha=0.5, weight="constant", every=every)
    options = {"t_min": 0.1}
    (_, whole), _ = tiny.value_and_grad(
        Terms(fokker_planck=dataclasses.replace(residual, every=1)), **options
    )
    for step in range(4):
        (loss, metrics), _ = tiny.value_and_grad(
            Terms(fokker_planck=residual), step=step, **options
        )
        expected = every * whole["fp"] if step % every == 0 else 0.0
        np.testing.assert_allclose(metrics["fp"], expected, rtol=1e-5)
        np.testing.assert_allclose(loss, metrics["dsm"] + 0.5 * expected, rtol=1e-4)


def test_the_regulariser_does_not_depend_on_the_proposal_of_t():
    """Times from p(t), one per cell, weighted back to uniform ones."""
    means = []
    for switches in LAWS[1:3]:
        law = losses.time_law(SDE, smallest_time=0.05, **switches)
        u = jnp.linspace(0.5 / 4000, 1 - 0.5 / 4000, 4000)
        t = law.proposal.quantile(u)
        ratio = 1.0 / (law.proposal.density(t) * law.proposal.length)
        parts = {"dsm": jnp.zeros_like(t), "fp": 1.0 + t**2}
        terms = Terms(fokker_planck=FokkerPlanck(alpha=1.0, weight="constant"))
        values = terms.weighted(parts, SDE, t, law.weight(t, SDE), ratio)
        means.append(float(values.mean()))
    exact = 1.0 + (1.0 - 0.05**3) / 3.0 / 0.95
    np.testing.assert_allclose(means, exact, rtol=2e-3)


FORMS_AND_EXPONENTS = [("gradient", 1.0), ("advective", 2.0), ("gradient", 2.0), ("advective", 1.0)]


@pytest.mark.parametrize(
    ("name", "form_and_m"),
    [*zip(SDES, itertools.cycle(FORMS_AND_EXPONENTS), strict=False), ("vpsde", ("advective", 1.0))],
)
def test_finite_at_a_thousand_times_with_zero_outputs_and_dropout(name, form_and_m):
    """Values and gradients in float32, both ends of [t_min, T] among the times, fresh network."""
    sde, (form, m) = SDES[name](), form_and_m
    number, t_min = 1000, 1e-5
    network = MODELS["mlp"](hidden=8, depth=1, embed_dim=8, dropout=0.5)
    model = ScoreModel(network, sde, PARAMETERIZATIONS["noise"], TIME_LABELS["log_snr"])
    params = model.init(jax.random.key(0), (2,))
    zeroed = params | {n: jax.tree.map(jnp.zeros_like, params[n]) for n in ("output", "gain")}
    times = np.random.default_rng(0).uniform(t_min, sde.T, number).astype(np.float32)
    times[:2] = np.float32(t_min), sde.T
    z = jax.random.normal(jax.random.key(1), (number, 2))
    x = sde.perturb(jnp.ones((number, 2)), jnp.asarray(times), z)
    point = Point(x, jnp.asarray(times), z, jax.random.split(jax.random.key(2), number))
    terms = Terms(
        objective="ism",
        high_order=HighOrder(3),
        fokker_planck=FokkerPlanck(**VECTOR, form=form, m=m),
    )

    def total(p):
        found = terms.parts(model.score(p, jax.random.key(3)), sde, point)
        ones = jnp.ones_like(point.t)
        return jnp.mean(terms.weighted(found, sde, point.t, ones, ones)), found

    value_and_grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    for start in (params, zeroed):
        (loss, found), grads = value_and_grad(start)
        assert np.isfinite(loss)
        for leaf in [*jax.tree.leaves(grads), *found.values()]:
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("form", ["gradient", "advective"])
def test_one_dropout_mask_inside_one_evaluation(form):
    """The score inside is that of the one mask of the key, whatever the sweep."""
    tiny = Batch(SDE, (2,))
    point = a_point(8, 2, 0.3)
    point = Point(*(part.astype(jnp.float32) for part in point[:3]), point.keys)
    score = tiny.model.score(tiny.params, jax.random.key(5))
    terms = Terms(high_order=HighOrder(2), fokker_planck=FokkerPlanck(alpha=1.0, form=form))
    parts_at = jax.jit(lambda key: terms.parts(tiny.model.score(tiny.params, key), SDE, point))
    found, again = parts_at(jax.random.key(5)), parts_at(jax.random.key(5))
    dsm = np.sum((SDE.sigma(point.t)[:, None] * score(point.x, point.t) + point.z) ** 2, 1) / 2
    np.testing.assert_allclose(found["dsm"], dsm, rtol=1e-4)
    np.testing.assert_array_equal(found["fp"], again["fp"])
    other = parts_at(jax.random.key(6))
    assert np.abs(found["fp"] - other["fp"]).max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Terms(objective="elbo"), r"objective='elbo': allowed \['dsm', 'ism'\]"),
        (lambda: Terms(estimator="trace"), "derivative_estimator='trace'"),
        (lambda: Terms(num_probes=0), "num_probes=0"),
        (lambda: Terms(estimator="exact", num_probes=2), "num_probes=2: need .*exact"),
        (lambda: Terms(reduce_mean=False, high_order=HighOrder(2)), "reduce_mean=False"),
        (
            lambda: Terms(high_order=HighOrder(2, fraction=0.4)),
            "high_order_fraction=0.4: need 1, 1/2",
        ),
        (lambda: Terms(fokker_planck=FokkerPlanck(fraction=0.0)), "fp_fraction=0.0: need 1, 1/2"),
        (lambda: FokkerPlanck(weight="snr"), "fp_wgt_type='snr': allowed"),
        (lambda: FokkerPlanck(scalar_fp="yes"), "scalar_fp='yes': allowed"),
        (lambda: FokkerPlanck(scalar_fp="True", alpha=0.1), "'True': need training.beta > 0"),
        (lambda: FokkerPlanck(scalar_fp="False", beta=0.1), "'False': need training.alpha > 0"),
        (lambda: FokkerPlanck(form="jet"), "fp_form='jet': allowed"),
        (lambda: FokkerPlanck(m=-1.0), "training.m=-1.0: need a positive"),
        (lambda: FokkerPlanck(alpha=-0.1), "alpha=-0.1"),
        (lambda: FokkerPlanck(beta=-0.1), "beta=-0.1"),
        (lambda: FokkerPlanck(num_probes=3), r"fp_probes=3: allowed \[1, 2\]"),
        (
            lambda: FokkerPlanck(num_probes=2, m=1.0),
            "fp_probes=2: need 1, or training.m=2, not 1.0",
        ),
        (lambda: FokkerPlanck(every=0), "fp_every=0"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_that_a_fraction_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size on each device=12: need a multiple of 5"):
        parts(high_order=HighOrder(2, fraction=1 / 5))
