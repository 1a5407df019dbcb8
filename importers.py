"""Published checkpoints → TrainState, strict on every key and shape.

    Flax msgpack   score_sde, score_flow, mle_score_ode: one file checkpoint_<k> without extension
    PyTorch .pth   score_sde_pytorch, fp-diffusion

Parameters, moving average, moments of Adam and the number of steps are taken over; learning rate
and rate of the average come from the config. Nothing in a file is executed.

| published                                       | here                                        |
|-------------------------------------------------|---------------------------------------------|
| ResnetBlockBigGANpp_k, ResnetBlockDDPMpp_k      | ResnetBlockBigGAN_k, ResnetBlockDDPM_k      |
| AttnBlockpp_k                                   | AttnBlock_k                                 |
| Downsample_k/Conv2d_0/{weight, bias}            | FIRDownsample_k/Conv_0/{kernel, bias}       |
| Upsample_k/Conv2d_0/{weight, bias}              | FIRUpsample_k/{Conv_0/kernel, bias}         |
| GroupNorm_k/{scale, bias} of shape (1, 1, 1, C) | shape (C,)                                  |
| all_modules.<k> (PyTorch)                       | the k-th module in order of evaluation      |
| weight [O, I, h, w], [O, I], [C] (PyTorch)      | kernel [h, w, I, O], [I, O], scale [C]      |

All other names are the same, and Down- and Upsample are numbered anew, since published ones without
parameters take numbers, too.
"""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import torch_files
from parameterization import ScoreModel
from train_state import TrainState, equal_moments

logger = logging.getLogger("fokker")
Leaves = dict[str, np.ndarray]  # by path, as Conv_0/kernel
Rename = Callable[[Leaves], Leaves]
Hints = tuple[tuple[str, str], ...]

RENAMED = (
    (r"^ResnetBlock(BigGAN|DDPM)pp_", r"ResnetBlock\1_"),
    (r"^AttnBlockpp_", "AttnBlock_"),
    (r"^Downsample_(\d+)/Conv2d_0/weight$", r"FIRDownsample_\1/Conv_0/kernel"),
    (r"^Downsample_(\d+)/Conv2d_0/bias$", r"FIRDownsample_\1/Conv_0/bias"),
    (r"^Upsample_(\d+)/Conv2d_0/weight$", r"FIRUpsample_\1/Conv_0/kernel"),
    (r"^Upsample_(\d+)/Conv2d_0/bias$", r"FIRUpsample_\1/bias"),
)
# What modules or leaves that do not fit say of the config; the first that matches one of them.
HINTS = (
    (r"^GaussianFourierProjection", "model.embedding_type"),
    (r"^Combine", "model.progressive_input or model.progressive_combine"),
    (r"^(FIR)?(Down|Up)sample", "model.fir, model.progressive_input or model.progressive"),
    (r"^ResnetBlock", "model.num_res_blocks, model.ch_mult or model.resblock_type"),
    (r"^AttnBlock", "model.attn_resolutions or data.image_size"),
    (r"^(GroupNorm|Conv)_\d+$", "model.progressive"),
    (r"^Dense", "model.conditional"),
    (r"", "model.nf, model.ch_mult or data.num_channels"),
)


class Published(NamedTuple):
    """The arrays of a published file, under the names of this project."""

    step: int
    params: Leaves
    ema: Leaves
    first_moment: Leaves
    second_moment: Leaves
    adam_step: int


def load(path: Path, model: ScoreModel, shape: tuple[int, ...], fresh: TrainState) -> TrainState:
    """The TrainState of a published checkpoint.

    Args:
        path: a Flax msgpack file or a `.pth`.
        model: the network that the checkpoint should fit.
        shape: of one example.
        fresh: a state of that network and of the optimizer to use; shapes and dtypes suffice.

    Raises:
        ValueError: the file cannot be read or does not fit; names keys, shapes and config fields.
    """
    if not path.is_file():
        raise ValueError(f"training.init_from={str(path)!r}: there is no such file")
    if path.suffix in (".pth", ".pt"):
        found = read_torch(path, modules_in_order(model, shape))
    else:
        found = read_flax(path)
    return as_train_state(found, fresh, path, HINTS)


def as_train_state(found: Published, fresh: TrainState, path: Path, hints: Hints) -> TrainState:
    """Check what was found in a file, and put it into the tree of `fresh`."""
    expected = _flat(fresh.params)
    for name, value in found._asdict().items():
        if isinstance(value, dict):
            _check(value, expected, f"{path}, {name}", hints)
        elif not 0 <= value < 2**31:
            raise ValueError(f"{path}: {name} is {value}, no number of steps")

    def tree(leaves: Leaves) -> Any:
        like = {key: np.asarray(leaves[key], expected[key].dtype) for key in expected}
        return unflatten_dict(like, sep="/")

    opt_state = optax.tree.set(
        fresh.opt_state,
        mu=tree(found.first_moment),
        nu=tree(found.second_moment),
        count=np.asarray(found.adam_step, np.int32),
    )
    step = np.asarray(found.step, np.int32)
    law = None if fresh.time_law is None else equal_moments()
    state = TrainState(step, tree(found.params), tree(found.ema), opt_state, law)
    # Copies: a step donates its state, so no leaf may share memory with the file or another leaf.
    return jax.tree.map(jnp.array, state)


def modules_in_order(model: ScoreModel, shape: tuple[int, ...]) -> list[str]:
    """Names of the modules of the network that have parameters, in order of evaluation."""
    names: list[str] = []

    def init() -> None:
        names.extend(model.init_in_order(jax.random.key(0), shape))

    jax.eval_shape(init)
    return names


STATE = {"step", "optimizer", "lr", "model_state", "ema_rate", "params_ema", "rng"}
DEQ_STATE = STATE - {"model_state"} | {"ema_train_bpd", "ema_eval_bpd"}


def read_flax(path: Path) -> Published:
    """A State of score_sde, score_flow or mle_score_ode.

    Raises:
        ValueError: the file is no such State.
    """
    state = read_msgpack(path)
    if "ema_train_bpd" in state:
        raise ValueError(
            f"{path} is the checkpoint of a dequantiser, not of a score model: use deq.init_from"
        )
    if state.keys() != STATE:
        raise ValueError(
            f"{path} is no State of score_sde, score_flow or mle_score_ode: it lacks "
            f"{sorted(STATE - state.keys())} and has {sorted(state.keys() - STATE)} instead"
        )
    if state["model_state"]:
        raise ValueError(f"{path}: its State lacks an empty model_state")
    return optimized_state(path, state, _renamed)


def read_msgpack(path: Path) -> dict[str, Any]:
    """The dict of a Flax file; ValueError if it is damaged."""
    try:
        state = serialization.msgpack_restore(path.read_bytes())
        return {str(key): value for key, value in state.items()}
    except Exception as error:
        # What msgpack raises for damaged data is not documented; all of it means the same here.
        raise ValueError(f"{path} is no Flax checkpoint, or is truncated: {error}") from None


def optimized_state(path: Path, state: dict[str, Any], renamed: Rename) -> Published:
    """Parameters, average and moments of a published state, its leaves renamed."""
    try:
        optimizer = state["optimizer"]
        moments = _flat(optimizer["state"]["param_states"])
        strange = {key.rpartition("/")[2] for key in moments} ^ {"grad_ema", "grad_sq_ema"}
        strange |= optimizer.keys() ^ {"target", "state"}
        strange |= optimizer["state"].keys() ^ {"step", "param_states"}
        if strange:
            raise KeyError(*sorted(strange))
        return Published(
            step=int(state["step"]),
            params=renamed(_flat(optimizer["target"])),
            ema=renamed(_flat(state["params_ema"])),
            first_moment=renamed(_under(moments, "grad_ema")),
            second_moment=renamed(_under(moments, "grad_sq_ema")),
            adam_step=int(optimizer["state"]["step"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its State has or lacks {error}") from None


def read_torch(path: Path, order: list[str]) -> Published:
    """A checkpoint of score_sde_pytorch or fp-diffusion.

    Args:
        path: the file.
        order: modules of the network in order of evaluation.

    Raises:
        ValueError: the file is no such checkpoint.
    """
    state = torch_files.read(path)
    if isinstance(state, dict) and state and all(map(_is_weight, state)):
        state = {"model": state}
    wanted = {"optimizer", "model", "ema", "step"}
    if not isinstance(state, dict) or "model" not in state or state.keys() - wanted:
        keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} is no checkpoint of score_sde_pytorch or fp-diffusion: it holds {keys} "
            f"instead of {sorted(wanted)}, or 'model' alone"
        )
    try:
        missing = sorted(wanted - state.keys())
        if "optimizer" in state and not state["optimizer"]["state"]:
            missing.append("moments of its optimizer")
        if missing:
            logger.warning("%s has no %s: %s", path, ", ".join(missing), WITHOUT)
        return _torch_state(state, order)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: {type(error).__name__} {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


WITHOUT = "what a file lacks is the weights for the average, 0 for the moments and the steps"


def _is_weight(key: object) -> bool:
    """Say whether a key names a tensor of a network, as in files that hold only weights."""
    name = str(key).removeprefix("module.")
    return name.startswith("all_modules.") or name == "sigmas"


def _torch_state(state: dict[str, Any], order: list[str]) -> Published:
    model = {key.removeprefix("module."): value for key, value in state["model"].items()}
    strange = [key for key in model if not key.startswith("all_modules.") and key != "sigmas"]
    if strange:
        raise ValueError(f"{strange[0]} belongs to none of the networks ncsnpp and ddpm")
    model = {key: value for key, value in model.items() if key != "sigmas"}
    numbers = sorted({int(key.split(".")[1]) for key in model})
    if len(numbers) != len(order):
        raise ValueError(
            f"the checkpoint has {len(numbers)} modules, the network of the config {len(order)}: "
            "model.num_res_blocks, model.ch_mult, model.attn_resolutions, model.progressive or "
            "model.progressive_input probably differ"
        )
    names = dict(zip(numbers, order, strict=True))
    places = [_torch_place(key, value, names) for key, value in model.items()]
    frozen = [place.startswith("GaussianFourierProjection") for place, _ in places]

    def named(arrays: Iterable[np.ndarray]) -> Leaves:
        pairs = zip(places, arrays, strict=True)
        return {place: turn(np.asarray(array)) for (place, turn), array in pairs}

    values = list(model.values())
    shadow, average = list(state["ema"]["shadow_params"]) if "ema" in state else values[:], []
    trained = len(values) - sum(frozen)
    if len(shadow) not in (trained, len(values)):
        raise ValueError(f"ema.shadow_params has {len(shadow)} tensors instead of {trained}")
    held = len(shadow) < len(values)
    for value, fixed in zip(values, frozen, strict=True):
        average.append(value if held and fixed else shadow.pop(0))
    moments = state.get("optimizer", {"state": {}})["state"]
    adam_step = _adam_step(moments, frozen)
    zero = [{"exp_avg": np.zeros_like(v), "exp_avg_sq": np.zeros_like(v)} for v in values]
    adam = [moments.get(i, nothing) for i, nothing in enumerate(zero)]
    return Published(
        step=int(np.asarray(state.get("step", 0))),
        params=named(values),
        ema=named(average),
        first_moment=named(moment["exp_avg"] for moment in adam),
        second_moment=named(moment["exp_avg_sq"] for moment in adam),
        adam_step=adam_step,
    )


def _adam_step(moments: dict[int, Any], frozen: list[bool]) -> int:
    """Return how many steps Adam has taken, equal for all trained tensors; 0 without moments."""
    updated = {i for i, fixed in enumerate(frozen) if not fixed}
    if moments and (moments.keys() - set(range(len(frozen))) or updated - moments.keys()):
        raise ValueError(f"the optimizer has moments of {len(moments)} tensors, not {len(updated)}")
    steps = {int(np.asarray(moment["step"])) for moment in moments.values()} or {0}
    if len(steps) != 1:
        raise ValueError(f"the moments are of different steps: {sorted(steps)}")
    return steps.pop()


def _torch_place(key: str, value: np.ndarray, names: dict[int, str]) -> tuple[str, Callable]:
    """Path here of a key all_modules.<k>.…, and how its array is turned."""
    _, number, *rest = key.split(".")
    path, leaf = "/".join([names[int(number)], *rest[:-1]]), rest[-1]
    if leaf == "weight" and value.ndim == 1:
        return f"{path}/scale", lambda array: array
    if leaf == "weight" and value.ndim == 2:
        return f"{path}/kernel", np.transpose
    if leaf == "weight":
        path = path.replace("Conv2d_0", "Conv_0")
        return f"{path}/kernel", lambda array: array.transpose(2, 3, 1, 0)
    up = path.startswith("FIRUpsample")
    path = path.replace("/Conv2d_0", "" if up else "/Conv_0")
    return f"{path}/{leaf}", lambda array: array


def _flat(tree: Any) -> Leaves:
    return flatten_dict(serialization.to_state_dict(tree), sep="/")


def _under(leaves: Leaves, last: str) -> Leaves:
    end = f"/{last}"
    return {key.removesuffix(end): leaf for key, leaf in leaves.items() if key.endswith(end)}


def _renamed(leaves: Leaves) -> Leaves:
    """Published leaves of the JAX codes under the names of this project."""
    new: dict[str, str] = {}
    for kind in ("Downsample", "Upsample"):
        numbers = {int(n) for key in leaves for n in re.findall(rf"^{kind}_(\d+)/", key)}
        new |= {f"{kind}_{old}": f"{kind}_{i}" for i, old in enumerate(sorted(numbers))}
    found = {}
    for key, leaf in leaves.items():
        first, _, rest = key.partition("/")
        name = f"{new.get(first, first)}/{rest}"
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        parts = name.split("/")
        shape = np.shape(leaf)
        old_norm = parts[-2:-1] and parts[-2].startswith("GroupNorm_") and shape[:-1] == (1, 1, 1)
        if name in found:
            raise KeyError(f"{key} twice")
        found[name] = leaf.reshape(shape[-1:]) if old_norm else leaf
    return found


def _check(found: Leaves, expected: Leaves, where: str, hints: Hints) -> None:
    """Same keys and shapes, finite numbers; or an error that says what is not."""
    for key, leaf in found.items():
        real = isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"
        if not (real and np.isfinite(leaf).all()):
            raise ValueError(f"{where}: {key} is no array of finite real numbers")
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = {
        key: f"{key}: {found[key].shape} instead of {expected[key].shape}"
        for key in sorted(expected.keys() & found.keys())
        if tuple(found[key].shape) != tuple(expected[key].shape)
    }
    if not (missing or extra or shapes):
        return
    modules = {key.split("/")[0] for key in expected} ^ {key.split("/")[0] for key in found}
    attention_alone = shapes and all(key.startswith("AttnBlock") for key in shapes)
    strange = modules or {"AttnBlock" if attention_alone else ""}
    hint = next(text for pattern, text in hints if any(re.search(pattern, m) for m in strange))
    parts = [
        f"{len(names)} {text}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        for text, names in (
            ("leaves are missing", missing),
            ("are not in the network", extra),
            ("have another shape", list(shapes.values())),
        )
        if names
    ]
    raise ValueError(f"{where} does not fit the network; {'; '.join(parts)}; probably {hint}")
