"""Published dequantisers (DeqState of score_flow and mle_score_ode) → TrainState.

Leaves W, b of convolutions and products are kernel, bias here; V, g, b direction, gain, bias; g, b
of layer norms scale, bias.

| published                              | here                                                |
|----------------------------------------|-----------------------------------------------------|
| ShallowProcessor_0/proj, c<i>_c1, _c2  | context/input, context/conv_<i>/first, last         |
| DeepProcessor_0/proj, pos_emb_dq       | context/input, context/position                     |
| … c<i>_c1, c<i>_c2, dqln<i>, ln<i>     | context/block_<i>/conv/first, last, norm_1, norm_2  |
| … dqattn<i>_proj1, _proj2              | context/block_<i>/attention/first, last             |
| Norm_<k>/norm<j>_g, Pointwise_<k>/W<j> | normalization_<k>/gain_<j>, mixing_<k>/weight_<j>   |
| MixLogisticAttnCoupling_<k>/pos_emb    | coupling_<k>/position                               |
| … proj_in (shallow), c1 (deep)         | coupling_<k>/input                                  |
| … block<i>_conv_c1, _c2, _a_proj       | coupling_<k>/block_<i>/conv/first, last, context    |
| … block<i>_ln1, _attn_proj1, …         | coupling_<k>/block_<i>/norm_1, attention/first, …   |
| … block<last>_proj_out or block<last>_c2 | coupling_<k>/output                               |

The 3×3 kernels of the shallow network were applied with height and width exchanged; they are
transposed here.
"""

import re
from pathlib import Path

from importers import (
    DEQ_STATE,
    Leaves,
    Published,
    as_train_state,
    optimized_state,
    read_msgpack,
)
from train_state import TrainState

RENAMED = (
    (r"^params/", ""),
    (r"^ShallowProcessor_0/c(\d+)_c1_", r"context/conv_\1/first/"),
    (r"^ShallowProcessor_0/c(\d+)_c2_", r"context/conv_\1/last/"),
    (r"^DeepProcessor_0/pos_emb_dq$", "context/position"),
    (r"^DeepProcessor_0/c(\d+)_c", r"context/block_\1_conv_c"),
    (r"^DeepProcessor_0/dqln(\d+)_", r"context/block_\1_ln1_"),
    (r"^DeepProcessor_0/ln(\d+)_", r"context/block_\1_ln2_"),
    (r"^DeepProcessor_0/dqattn(\d+)_", r"context/block_\1_attn_"),
    (r"^(?:Shallow|Deep)Processor_0/proj_", "context/input/"),
    (r"^Norm_(\d+)/norm(\d)_g$", r"normalization_\1/gain_\2"),
    (r"^Norm_(\d+)/norm(\d)_b$", r"normalization_\1/bias_\2"),
    (r"^Pointwise_(\d+)/W(\d)$", r"mixing_\1/weight_\2"),
    (r"^MixLogisticAttnCoupling_(\d+)/", r"coupling_\1/"),
    (r"^(coupling_\d+)/pos_emb$", r"\1/position"),
    (r"^(coupling_\d+)/(?:proj_in|c1)_", r"\1/input/"),
    (r"^(coupling_\d+)/block\d+_(?:proj_out|c2)_", r"\1/output/"),
    (r"^(coupling_\d+)/block(\d+)_", r"\1/block_\2_"),
    (r"_ln([12])_", r"/norm_\1/"),
    (r"_conv_c1_", "/conv/first/"),
    (r"_conv_c2_", "/conv/last/"),
    (r"_conv_a_proj_", "/conv/context/"),
    (r"_attn_proj1_", "/attention/first/"),
    (r"_attn_proj2_", "/attention/last/"),
    (r"/(norm_\d)/g$", r"/\1/scale"),
    (r"/W$", "/kernel"),
    (r"/V$", "/direction"),
    (r"/g$", "/gain"),
    (r"/b$", "/bias"),
)
HINTS = (("", "deq.filters, deq.components, deq.blocks, deq.couplings or deq.processor"),)


def load(path: Path, fresh: TrainState) -> TrainState:
    """The TrainState of a published dequantiser.

    Args:
        path: a Flax msgpack file.
        fresh: a state of the dequantiser and of the optimizer to use; shapes and dtypes suffice.

    Raises:
        ValueError: the file cannot be read or does not fit; names keys, shapes and config fields.
    """
    if not path.is_file():
        raise ValueError(f"deq.init_from={str(path)!r}: there is no such file")
    return as_train_state(read(path), fresh, path, HINTS)


def read(path: Path) -> Published:
    """A DeqState of score_flow or mle_score_ode.

    Raises:
        ValueError: the file is no such state.
    """
    state = read_msgpack(path)
    if state.keys() != DEQ_STATE:
        raise ValueError(
            f"{path} is no DeqState of score_flow or mle_score_ode: it lacks "
            f"{sorted(DEQ_STATE - state.keys())} and has {sorted(state.keys() - DEQ_STATE)} instead"
        )
    return optimized_state(path, state, renamed)


def renamed(leaves: Leaves) -> Leaves:
    """Published leaves under the names and in the shapes of this project."""
    found = {}
    for key, leaf in leaves.items():
        name = key
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise KeyError(f"{key} twice")
        if name.endswith("/kernel"):  # products become 1×1 convolutions
            leaf = leaf[None, None] if leaf.ndim == 2 else leaf.swapaxes(0, 1)
        if re.search(r"/norm_\d/", name) and leaf.shape[:-1] == (1, 1, 1):
            leaf = leaf.reshape(-1)
        found[name] = leaf
    return found
