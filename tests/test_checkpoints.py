"""Checkpoints: what is saved comes back, what is kept, what is refused."""

import json
import shutil
import threading
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import checkpoints
import checksums
import train_state
from checkpoints import Checkpoints, DamagedError, MisfitError, whole_steps
from train_state import OptimizerConfig, TrainState

pytestmark = pytest.mark.usefixtures("four_devices")

OPTIMIZER = OptimizerConfig("Adam", 1e-3, 0.9, 0.999, 1e-8, 0.0, 10, 1.0, "cosine").chain(100)


def state_of(step=0, shape=(3, 2), names=("bias", "kernel"), seed=0, adaptive=False) -> TrainState:
    """A state with different random numbers in every leaf, of three dtypes."""
    rng = np.random.default_rng(seed)
    dense = {name: jnp.zeros(shape) for name in names}
    params = {"Dense_0": dense, "half": jnp.zeros(3, jnp.bfloat16)}
    fresh = train_state.create(params, OPTIMIZER, adaptive=adaptive)
    random = jax.tree.map(lambda a: jnp.asarray(100 * rng.random(a.shape), a.dtype), fresh)
    return random.replace(step=jnp.asarray(step, jnp.int32))


def assert_same(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        if isinstance(b, jax.ShapeDtypeStruct):
            assert a is b
            continue
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def saved_steps(workdir, steps, keep_every=None):
    """Save states of these steps, close, and return what a new run finds."""
    checkpoints = Checkpoints(workdir, keep_every=keep_every)
    for step in steps:
        checkpoints.save(state_of(step, seed=step))
    checkpoints.close()
    again = Checkpoints(workdir)
    found = again.steps()
    again.close()
    return found


@pytest.fixture
def saved(tmp_path):
    """Checkpoints with one state, of step 5, opened anew."""
    assert saved_steps(tmp_path, [5]) == [5]
    checkpoints = Checkpoints(tmp_path)
    yield checkpoints
    checkpoints.close()


def test_restored_state_is_the_saved_one(saved):
    expected = state_of(5, seed=5)
    assert_same(saved.restore(5, state_of(0, seed=1)), expected)


def test_restores_into_shapes_alone(saved):
    """As evaluation does, which never makes parameters of its own."""
    shapes = jax.eval_shape(lambda: state_of())
    restored = saved.restore(5, shapes)
    assert_same(restored, state_of(5, seed=5))
    assert isinstance(restored, TrainState)


def test_of_a_state_only_some_fields_may_be_read(saved, monkeypatch):
    """Values that were not asked for are neither read nor compared; those that were, are."""
    shapes, compared, read = jax.eval_shape(lambda: state_of()), [], []
    of, restore = checksums.of, saved._manager.restore
    monkeypatch.setattr(checksums, "of", lambda tree: compared.append(tree) or of(tree))
    monkeypatch.setattr(
        saved._manager,
        "restore",
        lambda step, args: read.append(args.item) or restore(step, args=args),
    )
    found = saved.restore(5, shapes, ("step", "ema_params"))
    assert_same(found, shapes.replace(step=found.step, ema_params=found.ema_params))
    assert_same(found.ema_params, state_of(5, seed=5).ema_params)
    assert int(found.step) == 5
    assert [set(tree) for tree in (*compared, *read)] == [{"step", "ema_params"}] * 2
    monkeypatch.setattr(checksums, "of", lambda tree: {"ema_params.half": "bfloat16 0"})
    with pytest.raises(DamagedError, match=r"the values of ema_params\.half are not those"):
        saved.restore(5, shapes, ("step", "ema_params"))


def test_latest_two_and_every_multiple_are_kept(tmp_path):
    assert saved_steps(tmp_path, range(0, 50, 5), keep_every=20) == [0, 20, 40, 45]


def test_only_the_latest_two_are_kept_without_a_period(tmp_path):
    assert saved_steps(tmp_path, [0, 3, 7]) == [3, 7]


def test_opening_deletes_nothing(tmp_path):
    kept = saved_steps(tmp_path, [0, 10, 20, 30], keep_every=10)
    assert kept == [0, 10, 20, 30]
    assert saved_steps(tmp_path, []) == kept


def test_what_was_kept_stays_whatever_the_period_is_now(tmp_path):
    kept = saved_steps(tmp_path, range(0, 60, 5), keep_every=10)
    assert kept == [0, 10, 20, 30, 40, 50, 55]
    assert saved_steps(tmp_path, [60, 65], keep_every=1000) == [0, 10, 20, 30, 40, 50, 60, 65]


def test_what_a_kill_has_left_is_deleted_when_training_starts_again(tmp_path):
    """Once between the commit of a checkpoint and the end of the deletion of an older one."""
    folder, aside = tmp_path / "checkpoints", tmp_path / "aside"
    saved_steps(tmp_path, [0, 5, 10, 15], keep_every=10)
    shutil.copytree(folder / "15", aside / "15")
    shutil.copytree(folder / "10", aside / "25")
    (aside / "25" / "_CHECKPOINT_METADATA").unlink()  # half-deleted
    (aside / "40.orbax-checkpoint-tmp").mkdir()  # half-written
    saved_steps(tmp_path, [20, 25, 30, 35], keep_every=10)
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    assert whole_steps(tmp_path) == [0, 10, 15, 20, 25, 30, 35]
    assert saved_steps(tmp_path, []) == [0, 10, 15, 20, 25, 30, 35]  # as evaluation opens it
    Checkpoints(tmp_path, keep_every=1000).close()
    assert sorted(path.name for path in folder.iterdir()) == ["0", "10", "20", "30", "35"]


def test_checkpoints_of_older_code_stay(tmp_path):
    saved_steps(tmp_path, [0, 5, 10], keep_every=10)
    path = tmp_path / "checkpoints"
    shutil.copytree(path / "5", path / "3")
    (path / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    Checkpoints(tmp_path, keep_every=10).close()
    assert whole_steps(tmp_path) == [0, 3, 5, 10]


def test_saving_a_step_again_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(5, seed=1))
    checkpoints.save(state_of(5, seed=2))
    assert_same(checkpoints.restore(5, state_of()), state_of(5, seed=1))
    checkpoints.close()


def test_empty_folder_has_no_steps(tmp_path):
    assert saved_steps(tmp_path / "new", []) == []


# Asynchronous writing.


def test_close_waits_for_the_write(tmp_path):
    """The state is large enough for the write to outlive the call."""
    state = state_of(1, shape=(500, 1000))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.steps() == [1]
    assert_same(again.restore(1, jax.eval_shape(lambda: state)), state)
    again.close()


def test_steps_and_restore_wait_for_the_write(tmp_path):
    state = state_of(1, shape=(500, 1000))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    assert checkpoints.steps() == [1]
    assert (tmp_path / "checkpoints" / "1").is_dir()
    checkpoints.save(state.replace(step=jnp.asarray(2, jnp.int32)))
    assert_same(checkpoints.restore(2, state).params, state.params)
    checkpoints.close()


def test_save_is_a_snapshot_of_a_state_that_is_donated_next(tmp_path):
    """The next training step overwrites the buffers while the write is under way."""
    state = state_of(1, shape=(500, 1000))
    expected = jax.tree.map(lambda a: np.array(a, copy=True), state)
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    jax.block_until_ready(step(state))
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert_same(again.restore(1, jax.eval_shape(lambda: expected)), expected)
    again.close()


@pytest.mark.parametrize("name", ["7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-1700000000"])
def test_interrupted_save_is_ignored_and_can_be_repeated(tmp_path, name):
    saved_steps(tmp_path, [5])
    stale = tmp_path / "checkpoints" / name
    stale.mkdir()
    (stale / "part").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [5]
    checkpoints.save(state_of(7, seed=7))
    assert_same(checkpoints.restore(7, state_of()), state_of(7, seed=7))
    checkpoints.close()


# Refusals.


def test_missing_step_is_refused_with_what_there_is(saved):
    with pytest.raises(ValueError, match=r"no checkpoint of step 6 .*there are \[5\]"):
        saved.restore(6, state_of())


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (state_of(shape=(2, 3)), r"params\.Dense_0\.kernel: saved \(3, 2\), wanted \(2, 3\)"),
        (state_of(shape=(4, 2)), r"params\.Dense_0\.kernel: saved \(3, 2\), wanted \(4, 2\)"),
        (state_of(names=("kernel",)), r"params\.Dense_0\.bias: saved \(3, 2\), wanted nothing"),
        (
            state_of(names=("bias", "kernel", "scale")),
            r"params\.Dense_0\.scale: saved nothing, wanted \(3, 2\)",
        ),
    ],
    ids=["transposed", "larger", "leaf too many", "leaf missing"],
)
def test_state_that_does_not_fit_is_refused_with_its_leaves(saved, like, message):
    with pytest.raises(MisfitError, match=message):
        saved.restore(5, like)
    with pytest.raises(MisfitError, match=message):
        saved.restore(5, jax.eval_shape(lambda: like))


def test_another_network_is_not_a_damage_to_pass_over(tmp_path):
    saved_steps(tmp_path, [5])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(7, shape=(4, 2)))
    with pytest.raises(MisfitError):
        checkpoints.restore_latest(state_of())
    checkpoints.close()
    assert not (tmp_path / "checkpoints-damaged").exists()


def test_shapes_that_orbax_has_not_written_down_are_asked_for(saved, monkeypatch):
    """TensorStore is asked only then."""
    asked, ask = [], saved._manager.item_metadata
    monkeypatch.setattr(saved._manager, "item_metadata", lambda n: asked.append(n) or ask(n))
    assert_same(saved.restore(5, state_of()), state_of(5, seed=5))
    assert asked == []
    path = saved.directory / "5" / "default" / "_METADATA"
    path.write_text(path.read_text().replace("write_shape", "shape"))
    assert_same(saved.restore(5, state_of()), state_of(5, seed=5))
    assert asked == [5]


@pytest.mark.parametrize("part", [
    "default/_METADATA", "default/d", "default/manifest.ocdbt", "default/crc32.json",
])  # fmt: skip
def test_damage_of_any_part_is_damage(saved, part):
    path = saved.directory / "5" / part
    for file in [path] if path.is_file() else path.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DamagedError, match="5 cannot be read: "):
        saved.restore(5, state_of())


def test_lost_checksums_are_damage(saved):
    (saved.directory / "5" / "default" / "crc32.json").unlink()
    with pytest.raises(DamagedError, match=r"5 cannot be read: .*crc32\.json"):
        saved.restore(5, state_of())


def test_a_leaf_without_a_checksum_is_damage(saved):
    path = saved.directory / "5" / "default" / "crc32.json"
    sums = json.loads(path.read_text())
    del sums["params.half"]
    path.write_text(json.dumps(sums))
    with pytest.raises(DamagedError, match=r"the values of params\.half are not those"):
        saved.restore(5, state_of())
    path.write_text("{}")
    assert not saved.holds(state_of(5, seed=5))


def test_checksums_of_older_code_are_compared(saved):
    """It kept them in the metadata of the checkpoint."""
    state, metadata = state_of(5, seed=5), saved.directory / "5" / "_CHECKPOINT_METADATA"
    (saved.directory / "5" / "default" / "crc32.json").unlink()
    sums = checksums.of(state)
    metadata.write_text(json.dumps({"custom_metadata": {"crc32": sums}}))
    assert_same(saved.restore(5, state_of()), state)
    assert saved.holds(state)
    sums["params.half"] = "bfloat16 00000000"
    metadata.write_text(json.dumps({"custom_metadata": {"crc32": sums}}))
    assert not saved.holds(state)
    with pytest.raises(DamagedError, match=r"the values of params\.half are not those"):
        saved.restore(5, state_of())


def test_training_goes_on_while_checksums_are_computed(tmp_path, monkeypatch):
    """They are of the state that was saved, whose memory the next step uses again."""
    of, going_on, threads = checksums.of, threading.Event(), []

    def late(tree):
        threads.append(threading.current_thread())
        assert going_on.wait(60)
        return of(tree)

    monkeypatch.setattr(checksums, "of", late)
    run, state = Checkpoints(tmp_path), state_of(5, seed=5)
    run.save(state)
    step = jax.jit(lambda leaves: jax.tree.map(lambda a: a + 1, leaves), donate_argnums=0)
    jax.block_until_ready(step(state))
    going_on.set()
    run.close()
    assert threads
    assert threading.main_thread() not in threads
    monkeypatch.setattr(checksums, "of", of)
    again = Checkpoints(tmp_path)
    assert_same(again.restore(5, state_of()), state_of(5, seed=5))
    again.close()


def test_a_flipped_bit_is_damage(tmp_path):
    """Of the values, of which neither Orbax nor TensorStore keeps a checksum."""
    checkpoints, state = Checkpoints(tmp_path), state_of(5, shape=(64, 64))
    checkpoints.save(state)
    checkpoints.close()
    files = [path for path in (tmp_path / "checkpoints" / "5").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(DamagedError, match=r"5 cannot be read: the values of \S+ are not those"):
        checkpoints.restore(5, state)
    (tmp_path / "checkpoints" / "5" / "_CHECKPOINT_METADATA").write_text("{}")  # by older code
    assert not all(
        map(np.array_equal, *map(jax.tree.leaves, (state, checkpoints.restore(5, state))))
    )
    checkpoints.close()


class OlderState(flax.struct.PyTreeNode):
    """A TrainState of before laws of times were learned."""

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any


def without_law(state: TrainState) -> OlderState:
    return OlderState(state.step, state.params, state.ema_params, state.opt_state)


@pytest.mark.parametrize("saved_as", ["older", "without", "adaptive", "other bins"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["read without", "read adaptive"])
@pytest.mark.parametrize("written", ["by newer Orbax", "by older Orbax", "on devices"])
def test_a_learned_law_of_times_is_read_where_it_is_there_and_wanted(
    tmp_path, saved_as, adaptive, written
):
    """Elsewhere it starts anew; the rest of the state is as it was saved, bit by bit."""
    state = state_of(5, seed=5, adaptive=saved_as in ("adaptive", "other bins"))
    if saved_as == "other bins":
        state = state.replace(time_law=state.time_law[:, :4])
    state = without_law(state) if saved_as == "older" else state
    if written == "on devices":  # each of which writes a part
        everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), "all"), PartitionSpec())
        state = jax.device_put(state, everywhere)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.close()
    if written == "by older Orbax":
        path = tmp_path / "checkpoints" / "5" / "default" / "_METADATA"
        path.write_text(path.read_text().replace("write_shape", "shape"))
    checkpoints = Checkpoints(tmp_path)
    for like in (state_of(adaptive=adaptive), jax.eval_shape(lambda: state_of(adaptive=adaptive))):
        found = checkpoints.restore(5, like)
        assert_same(without_law(found), without_law(state))
        if not adaptive:
            assert found.time_law is None
        elif saved_as == "adaptive":
            np.testing.assert_array_equal(found.time_law, state.time_law)
        else:
            np.testing.assert_array_equal(found.time_law, np.ones((2, 16), np.float32))
    checkpoints.close()


def test_a_checkpoint_may_be_read_as_another_dtype(saved):
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state_of())
    like = like.replace(params=jax.tree.map(lambda a: a.update(dtype=jnp.float16), like.params))
    kernel = saved.restore(5, like).params["Dense_0"]["kernel"]
    expected = state_of(5, seed=5).params["Dense_0"]["kernel"].astype(jnp.float16)
    np.testing.assert_array_equal(kernel, expected)


def test_what_waits_for_other_processes_is_told_by_its_type():
    """Orbax wraps the error of JAX's service in one of its own, or gives up with a TimeoutError."""
    by_service = ValueError("in a thread")
    by_service.__cause__ = jax.errors.JaxRuntimeError("any words")
    assert checkpoints._is_of_processes(by_service)
    assert checkpoints._is_of_processes(TimeoutError())
    assert not checkpoints._is_of_processes(OSError("barrier, DEADLINE_EXCEEDED"))
