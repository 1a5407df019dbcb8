"""--mode=train_classifier: p(c | x_t) in WORKDIR/classifier, which guides samples towards a class.

The folder is a run folder like any other. The classes are those of the data, also where the score
network is not given them; times are uniform in log σ².
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

import checksums
import losses
import train_state
from checkpoints import Checkpoints
from checks import require
from operators import Batched, PerExample
from parameterization import TIME_LABELS
from run_lib import devices, folder, identities, loading
from run_lib.experiment import Experiment
from run_lib.trainer import HeldOut, Task, Trainer
from streams import Context, Finite
from train_state import TrainState

FOLDER = "classifier"
LABEL = "log_snr"


def labelled(experiment: Experiment) -> Experiment:
    """The same with the classes of the examples as context.

    Raises:
        FieldError: the data have no classes.
    """
    dataset = experiment.dataset
    allowed = "data with classes: y_train and y_test of an .npz, digits, mnist, cifar10 or svhn"
    splits = {name: split for name, split in dataset.splits.items() if isinstance(split, Finite)}
    known = all(split.labels is not None for split in splits.values())
    require(known and "train" in splits, "data.dataset", experiment.settings.data.dataset, allowed)
    given: dict[str, Any] = {
        name: dataclasses.replace(split, context=split.labels.astype("int32"))
        for name, split in splits.items()
    }
    classes = 1 + max(int(split.labels.max()) for split in splits.values())
    return Experiment(
        experiment.settings, dataclasses.replace(dataset, **given, context=Context((), classes))
    )


def log_prob(experiment: Experiment, classes: int) -> Callable[..., Float[Array, "b n"]]:
    """(params, x_t, t, key of the dropout or None) ↦ log p(c | x_t) of all classes."""
    settings = experiment.settings
    network, sde = settings.classifier.network(classes), settings.sde

    def of(params: Any, x: Batched, t: PerExample, key: Any = None) -> Float[Array, "b n"]:
        label = TIME_LABELS[LABEL](t, sde, settings.model.num_scales)
        rngs = None if key is None else {"dropout": key}
        logits: Any = network.apply(params, x, label, train=key is not None, rngs=rngs)
        return jax.nn.log_softmax(logits)

    return of


def train(experiment: Experiment, workdir: str | Path) -> TrainState:
    """Train the classifier to `classifier.n_iters` steps, from its latest checkpoint if any.

    Raises:
        ValueError: the data have no classes, or the folder was made with another config.
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
    """
    target = Path(workdir) / FOLDER
    check(experiment, workdir)
    experiment = labelled(experiment)
    settings, classes = experiment.settings, experiment.dataset.context.classes
    with folder.alone(target):
        identities.claim(experiment, target)
        kept = Checkpoints(target, keep_every=settings.training.snapshot_freq)
        if kept.steps():
            state = kept.restore_latest(_state_like(experiment))
        else:
            state = _fresh(experiment, jax.random.fold_in(experiment.keys["init"], 1))
        trainer = Trainer(experiment, _task(experiment, classes), state, kept)
        folder.write_json(target / "config.json", settings.resolved())
        folder.write_json(target / "versions.json", folder.versions())
        trainer.run()
    return trainer.state


def check(experiment: Experiment, workdir: str | Path) -> None:
    """Check what the training needs.

    Raises:
        ValueError: something is missing or does not fit.
    """
    devices.check_training_batch(experiment.settings.training)
    labelled(experiment)
    _reconcile(experiment, Path(workdir) / FOLDER)


def _reconcile(experiment: Experiment, target: Path) -> None:
    """Refuse a classifier of other noise, which an SDE with other fields is, or of other data."""
    ignore = ("eval", "sampling", "deq")
    folder.reconcile(target, experiment.settings.resolved(), ignore=ignore)


def _task(experiment: Experiment, classes: int) -> Task:
    settings = experiment.settings

    def loss(*, train: bool) -> losses.PerExampleLoss:
        law = losses.time_law(
            settings.sde, smallest_time=settings.training.smallest_time, likelihood_weighting=True,
            stratified=train, name="velocity",
        )  # fmt: skip
        size = settings.training.batch_size
        return losses.classifier_loss(
            log_prob(experiment, classes), settings.sde, experiment.encoding, law,
            batch_size=size, train=train,
        )  # fmt: skip

    return Task(
        name="classifier",
        n_iters=settings.classifier.n_iters,
        n_jitted_steps=settings.training.n_jitted_steps,
        ema_rate=settings.classifier.ema_rate,
        loss_fn=losses.mean_loss(loss(train=True)),
        frozen=(),
        held_out=HeldOut(loss(train=False), experiment, ()),
        snapshot=None,
    )


def _fresh(experiment: Experiment, key: Key[Array, ""]) -> TrainState:
    settings, classes = experiment.settings, experiment.dataset.context.classes
    x, label = jnp.zeros((1, *experiment.shape)), jnp.zeros(1)
    params = settings.classifier.network(classes).init(key, x, label)
    return train_state.create(params, settings.optim.chain(settings.classifier.n_iters))


def _state_like(experiment: Experiment) -> TrainState:
    """Shapes and dtypes of the state."""
    return jax.eval_shape(lambda: _fresh(experiment, jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Guide:
    """The trained classifier p(c | x_t) that guides samples.

    Attributes:
        params: its moving average.
        log_prob: (params, x_t, t) ↦ log p(c | x_t) of all classes.
        context: the classes.
        protocol: names its parameters.
    """

    params: Any
    log_prob: Callable[..., Float[Array, "b n"]]
    context: Context
    protocol: str

    def of(self, params: Any, classes: Array) -> Callable[[Batched, PerExample], PerExample]:
        """(x_t, t) ↦ log p(c | x_t) of these classes, one for each example."""

        def chosen(x: Batched, t: PerExample) -> PerExample:
            log_p = self.log_prob(params, x, t)
            return jnp.take_along_axis(log_p, classes[:, None], axis=1)[:, 0]

        return chosen


def load(experiment: Experiment, workdir: Path) -> Guide:
    """The classifier of a run folder.

    Raises:
        ValueError: there is none.
    """
    target = workdir / FOLDER
    allowed = f"'' or a classifier in {target}: run --mode=train_classifier with this --workdir"
    require(bool(loading.steps_in(target)), "sampling.guide", "classifier", allowed)
    _reconcile(experiment, target)
    experiment = labelled(experiment)
    with contextlib.closing(Checkpoints(target)) as kept:
        params = kept.read_latest(_state_like(experiment)).ema_params
    context = experiment.dataset.context
    return Guide(params, log_prob(experiment, context.classes), context, checksums.digest(params))
