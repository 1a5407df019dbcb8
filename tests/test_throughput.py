"""Microbatches, memory at the start, transfers, traces, and what may change between runs."""

import dataclasses
import gc
import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import run_lib
from checkpoints import Checkpoints
from likelihood import Divergence, ode_log_likelihood
from losses import mean_loss
from ode import Solver
from run_lib import devices, folder, interruption, metrics, trainer, training
from run_lib.experiment import Experiment
from run_lib.trainer import PendingMetrics, Trainer
from tests import tiny
from train_state import accumulated_gradient

pytestmark = pytest.mark.usefixtures("compiled_at_o0", "four_devices")


def gradients(numbers, dtype, **changes):
    """Gradient and metrics of the same batch of 16 in so many microbatches."""
    config = tiny.config()
    config.training.update(changes)
    experiment = Experiment.from_config(config)
    dataset = experiment.dataset
    loss = mean_loss(experiment.per_example_loss(train=True))
    batch = next(dataset.train_batches(batch_size=16, seed=0, first_step=0))
    batch |= {"noise_id": np.arange(16, dtype=np.int32), "step": np.int32(3)}
    params = experiment.model.init(jax.random.key(0), dataset.shape)
    params = jax.tree.map(lambda leaf: (leaf + 0.01).astype(dtype), params)
    return [
        jax.jit(accumulated_gradient(loss, n))(params, jax.random.key(5), batch) for n in numbers
    ]


ORDER_3 = {
    "score_matching_order": 3, "third_order_form": "directional", "high_order_fraction": 0.5,
    "alpha": 0.1, "fp_form": "advective", "fp_fraction": 0.5, "stratified": True,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "number"), [({}, 8), (ORDER_3, 2)])
def test_microbatches_give_the_gradient_of_the_whole_batch(changes, number: int) -> None:
    whole, *parts = gradients((1, number), jnp.float32, **changes)
    for part in parts:
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()) + 1e-8)


def test_the_parts_are_taken_in_turn() -> None:
    """Of a loss that tells the size of what it sees."""

    def loss(params, rng, batch):
        return params * jnp.mean(batch["x"]), {"rows": jnp.float32(len(batch["x"]))}

    batch = {"x": jnp.arange(16.0), "step": jnp.int32(0)}
    gradient, metrics = accumulated_gradient(loss, 4)(jnp.float32(2), jax.random.key(0), batch)
    assert (float(gradient), float(metrics["rows"])) == (7.5, 4)


def test_microbatches_in_float64() -> None:
    with jax.enable_x64(True):
        whole, parts = gradients((1, 4), jnp.float64, score_matching_order=2)
    assert whole[0]["output"]["kernel"].dtype == jnp.float64
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * float(jnp.abs(b).max()) + 1e-14)


def train(workdir: Path, **changes) -> list[dict]:
    config = tiny.config()
    config.training.update(changes)
    run_lib.train(Experiment.from_config(config), workdir)
    return [r for r in metrics.read_metrics(workdir) if r["split"] == "train"]


def test_a_run_in_microbatches_is_the_same_run(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    parts = train(tmp_path / "parts", microbatch=8)
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch": 5}, r"training.microbatch=5: need a divisor of training.batch_size=16"),
        ({"microbatch": -1}, r"training.microbatch=-1: need a divisor"),
        ({"microbatch": 2}, r"training.microbatch=2: must be a multiple of the 4 devices"),
        ({"profile_steps": -1}, r"training.profile_steps=-1: need 0 or more"),
        (
            {"microbatch": 4, "score_matching_order": 2, "high_order_fraction": 0.5},
            "batch_size on each device=1: need a multiple of 2 for a fraction",
        ),
    ],
)
def test_microbatches_that_do_not_divide_are_refused(tmp_path: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **changes)
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_that_does_not_fit_says_what_would(tmp_path: Path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", logger="fokker")
    train(tmp_path, n_jitted_steps=1, n_iters=1)
    said = re.search(r"a step takes (\S+) GiB of the (\S+) GiB of each device", caplog.text)
    assert 0.0 <= float(said[1]) < float(said[2])
    measured, needs = devices.needed, []
    monkeypatch.setattr(devices, "needed", lambda program: needs.append(measured(program)))
    train(tmp_path, n_jitted_steps=1, n_iters=2)  # XLA does not tell: nothing is refused
    (need,) = needs
    parameters = 4848 * 4
    assert need.kept > 4 * parameters  # the state: parameters, average, two moments
    assert need.temporary > parameters  # the gradient
    monkeypatch.setattr(devices, "needed", measured)
    monkeypatch.setattr(devices, "available", lambda: need.total - 1)
    with pytest.raises(ValueError, match=r"a step takes .* of a device: training.microbatch"):
        train(tmp_path / "small", n_jitted_steps=1)
    assert not list(metrics.read_metrics(tmp_path / "small"))


class Program:
    """A compiled step that needs 110 bytes and 1,000 per example."""

    argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 100, 100, 90

    def __init__(self, size: int) -> None:
        self.temp_size_in_bytes = 1000 * size

    def memory_analysis(self) -> "Program":
        return self


@pytest.mark.parametrize(
    ("limit", "advice", "compiled"),
    [
        (12_110, "training.microbatch=12 fits", [12]),
        (8_500, "training.microbatch=8 fits", [8]),
        (6_500, "training.microbatch=4 fits", [6, 4]),  # of 6 there is no half
        (1_000, "training.microbatch alone does not help (tried [])", []),
    ],
)
def test_advice_is_of_programs_that_were_compiled(limit, advice, compiled) -> None:
    tried = []

    def compile_with(size: int) -> Program:
        tried.append(size)
        if size == 6:
            raise ValueError("no whole number of examples")
        return Program(size)

    need = devices.needed(Program(24))
    assert need == (110, 24_000)
    found = devices.microbatch_that_fits(need, 24, [2, 4, 6, 8, 12], compile_with, limit)
    assert found.startswith(advice)
    assert tried == compiled


def test_advice_gives_up_after_a_few_compilations() -> None:
    stubborn = lambda size: Program(24)  # noqa: E731
    found = devices.microbatch_that_fits(
        devices.needed(Program(24)), 24, [1, 2, 3, 4, 6, 8, 12], stubborn, 20_000
    )
    assert found == "training.microbatch alone does not help (tried [12, 8, 6])"


def test_no_step_waits_for_a_transfer(tmp_path: Path) -> None:
    """State, key and batches are on the devices, as the compiled step wants them."""
    experiment = Experiment.from_config(tiny.config())
    trainer = training.score_trainer(experiment, tmp_path)
    for number, (_, batches) in enumerate(trainer.batches()):
        if number:
            with jax.transfer_guard("disallow"):
                trainer.state, _ = trainer.step_fn(trainer.state, trainer.key, batches)
        else:
            trainer.state, _ = trainer.step_fn(trainer.state, trainer.key, batches)
    trainer.checkpoints.close()
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # the guard works
        with jax.transfer_guard("disallow"):
            jnp.sin(np.ones(3)).block_until_ready()


def test_the_state_is_donated(tmp_path: Path) -> None:
    experiment = Experiment.from_config(tiny.config())
    trainer = training.score_trainer(experiment, tmp_path)
    before, (_, batches) = trainer.state, next(trainer.batches())
    trainer.step_fn(before, trainer.key, batches)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    trainer.checkpoints.close()


def test_a_trace_is_written_and_changes_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", n_jitted_steps=1)
    traced = train(tmp_path / "traced", n_jitted_steps=1, profile_steps=3)
    assert [r["loss"] for r in traced] == [r["loss"] for r in plain]
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "plain" / "profile").exists()


def state(workdir: Path, step: int):
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.restore(step, Experiment.from_config(tiny.config()).state_like)
    finally:
        checkpoints.close()


def test_changed_fields_take_effect_on_resume(tmp_path: Path) -> None:
    """Learning rate, moving average, batch size, steps per dispatch and microbatch."""
    train(tmp_path, n_iters=10)
    for number, (section, changes) in enumerate(
        [
            ("optim", {"lr": 1e-9}),
            ("model", {"ema_rate": 0.0}),
            ("training", {"batch_size": 8}),
            ("training", {"n_jitted_steps": 1}),
            ("training", {"microbatch": 8}),
        ]
    ):
        config = tiny.config()
        config.training.n_iters = 20
        config[section].update(changes)
        run = tmp_path / str(number)
        run.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            (run / name).write_bytes((tmp_path / name).read_bytes())
        (run / "checkpoints").symlink_to(tmp_path / "checkpoints")
        experiment = Experiment.from_config(config)
        folder.reconcile(run, experiment.settings.resolved())
        trainer = training.score_trainer(experiment, run)
        begun = jax.tree.map(np.asarray, trainer.state)
        _, batches = next(trainer.batches())
        assert batches["mask"].shape[0] == (1 if "n_jitted_steps" in changes else 5)
        assert batches["mask"].size // batches["mask"].shape[0] == changes.get("batch_size", 16)
        after, _ = trainer.step_fn(trainer.state, trainer.key, batches)
        moved = max(
            float(np.abs(a - b).max())
            for a, b in zip(*map(jax.tree.leaves, (begun.params, after.params)), strict=True)
        )
        assert (moved < 1e-7) == (changes == {"lr": 1e-9})
        same = [
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (after.params, after.ema_params)), strict=True)
        ]
        assert all(same) == (changes == {"ema_rate": 0.0})
        trainer.checkpoints.close()


@pytest.mark.parametrize(("microbatch", "size"), [(8, 2), (0, 4)])
def test_the_step_of_a_run_takes_microbatches(tmp_path: Path, microbatch: int, size: int) -> None:
    """Of the 4 examples that each of 4 devices has of a batch of 16."""
    config = tiny.config()
    config.training.microbatch = microbatch
    experiment = Experiment.from_config(config)
    usual, sizes = training.score_trainer(experiment, tmp_path), set()

    def seen(params, key, batch, *frozen):
        sizes.add(batch["image"].shape[0])
        return usual.task.loss_fn(params, key, batch, *frozen)

    task = dataclasses.replace(usual.task, loss_fn=seen)
    trainer = Trainer(experiment, task, usual.state, usual.checkpoints)
    _, batches = next(trainer.batches())
    trainer.step_fn.lower(trainer.state, trainer.key, batches)
    assert sizes == {size}
    trainer.checkpoints.close()


def test_few_dispatches_wait_for_the_devices(monkeypatch) -> None:
    """A stop waits for them: at most two beside the one that runs."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    pending = PendingMetrics()
    for step in range(5):
        pending.add(range(step, step + 1), {"loss": np.full(1, step)})
    assert [int(metrics["loss"][0]) for metrics in waited] == [0, 1, 2]


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = interruption.Agreement()
    assert [agreement(vote) for vote in (False, True, False)] == [False, True, False]


def test_several_processes_agree_two_calls_later(monkeypatch) -> None:
    agreement = interruption.Agreement()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_any", lambda votes: votes.max())
    votes = [False, True, False, False, False]
    assert [agreement(vote) for vote in votes] == [False, False, False, True, False]


def test_nothing_is_asked_without_a_main_program() -> None:
    with interruption.saving() as stop:
        assert not stop.asked()


def test_batches_are_split_before_they_are_asked_for() -> None:
    batch = devices.put({"x": np.arange(16.0).reshape(2, 8)}, axis=1)
    assert batch["x"].shape == (2, 4, 2)
    assert len(batch["x"].sharding.device_set) == 4


def test_no_program_outlives_its_mode() -> None:
    """Not even by the caches that jax.clear_caches leaves alone."""

    def traced() -> int:
        model = experiment.model
        score = model.score(model.init(jax.random.key(0), (8, 8, 1)))
        x, keys = jnp.zeros((2, 8, 8, 1)), jax.random.split(jax.random.key(1), 2)
        law = partial(
            ode_log_likelihood, score, model.sde, t_min=1e-3,
            solver=Solver(), divergence=Divergence("rademacher"),
        )  # fmt: skip
        jax.eval_shape(lambda x: law(x, keys).log_p, x)
        devices.release()
        return sum(isinstance(o, jax.extend.core.Jaxpr) for o in gc.get_objects())

    experiment = Experiment.from_config(tiny.config())
    found = [traced() for _ in range(3)]
    assert found[2] == found[1]


@pytest.fixture
def requests_and_hits() -> Iterator[list[str]]:
    """What is asked of the cache of compiled programs, however fast they compile, and found."""
    told = []
    names = {"compile_requests_use_cache": "asked", "cache_hits": "found"}

    def listen(event: str, **kwargs) -> None:
        told.extend(names[n] for n in [event.rpartition("/")[2]] if n in names)

    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(listen)
    yield told
    jax.monitoring.unregister_event_listener(listen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_a_second_start_compiles_nothing(tmp_path: Path, requests_and_hits: list[str]) -> None:
    """Neither training nor evaluation: a program that calls back to Python would not be kept."""
    experiment = Experiment.from_config(tiny.config())
    for name in ("first", "second"):
        jax.clear_caches()
        requests_and_hits.clear()
        run_lib.train(experiment, tmp_path / name)
        run_lib.evaluate(experiment, tmp_path / name, "eval")
    assert requests_and_hits.count("asked") > 20
    assert requests_and_hits.count("found") == requests_and_hits.count("asked")


def test_what_the_last_steps_need_is_compiled_and_checked_at_the_start(
    tmp_path, monkeypatch, caplog, requests_and_hits
) -> None:
    """11 steps in dispatches of 5, 5 and 1."""
    caplog.set_level("INFO", logger="fokker")
    seen, events = {}, trainer.Trainer.events

    def counted(self, *arguments) -> None:
        events(self, *arguments)
        seen[self.step] = len(requests_and_hits)

    monkeypatch.setattr(trainer.Trainer, "events", counted)
    train(tmp_path / "whole", n_iters=11, eval_freq=5, snapshot_freq=5)
    assert list(seen) == [5, 10, 11]
    assert seen[10] == seen[11]
    assert len(re.findall("a step takes .* of each device", caplog.text)) == 1
    assert caplog.text.count("compiling the training step") == 1
    assert caplog.text.count("compiling the held-out loss") == 1


@pytest.mark.parametrize(
    ("first", "last", "counts"),
    [(0, 20, [5, 5, 5, 5]), (3, 11, [2, 5, 1]), (3, 5, [2]), (6, 9, [3]), (6, 12, [4, 2])],
)
def test_dispatches_end_at_multiples(first, last, counts) -> None:
    found = object.__new__(trainer.Trainer)
    found.task = trainer.Task("", last, 5, 0.9, None, (), None, None)
    while first < last:
        counts, here = counts[1:], counts[0]
        assert found._count(first) == here
        first += here
    assert counts == []


def test_compilation_is_not_counted_in_the_time_left(monkeypatch, caplog) -> None:
    caplog.set_level("INFO", logger="fokker")
    clock = itertools.count(0.0, 20.0)  # 20 s from each look to the next
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    progress = metrics.Progress(0, 100, "step")
    with progress.compiling("a step"):
        next(clock)  # of 40 s
    progress.update(40, {})
    assert "compiling a step" in caplog.text
    # From the start to here 80 s, of which 40 count.
    assert "step 40/100, 1.0 steps/s, 60 s left" in caplog.text


def test_the_time_that_the_rest_takes_is_said_once(tmp_path, caplog) -> None:
    """By the second dispatch, of the steps behind it, in the unit that suits it."""
    caplog.set_level("INFO", logger="fokker")
    run_lib.train(Experiment.from_config(tiny.config()), tmp_path)
    (said,) = [message for message in caplog.messages if "more steps take about" in message]
    assert re.fullmatch(r"10 more steps take about \d+ s, without evaluations and .*", said)
    progress = metrics.Progress(0, 1000, "step")
    for seconds, text in ((2.0, "36 s"), (20.0, "6 min"), (200.0, "60 min"), (400.0, "2.0 h")):
        caplog.clear()
        progress.estimate(100, 50, seconds)
        assert f"900 more steps take about {text}, " in caplog.text
    caplog.clear()
    progress.estimate(1000, 50, 2.0)
    assert not caplog.text
