"""Error of bfloat16 networks by depth: score and Hv against float32.

    python -m benchmarks.bfloat16 [--blocks=1,2,4,8] [--nf=32]

DDPM++ on 16×16×3, two levels, with weights of order one over √fan_in in every layer, at x_t of
noise levels spread over [1e-3, 1]. Printed: ‖coarse − exact‖/‖exact‖ over a batch, of s and of H v
with both in bfloat16 and with v a Rademacher probe.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from models import MODELS
from operators import rademacher
from parameterization import ScoreModel
from sde_lib import VPSDE

SHAPE, BATCH = (16, 16, 3), 16


def random_params(model: ScoreModel) -> dict:
    """No layer starts near zero, so that none hides its error."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), SHAPE))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.asarray(1.0 + 0.1 * rng.standard_normal(leaf.shape), jnp.float32)
        scale = 1.0 / math.sqrt(math.prod(leaf.shape[:-1]))
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


def errors(blocks: int, nf: int) -> tuple[int, float, float]:
    """(parameters, relative error of the score, of H v)."""
    network = MODELS["ncsnpp"](nf=nf, ch_mult=(1, 2), num_res_blocks=blocks, attn_resolutions=(8,))
    exact = ScoreModel(network, VPSDE())
    coarse = ScoreModel(network.clone(dtype="bfloat16"), VPSDE())
    params = random_params(exact)
    x = jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
    t = jnp.geomspace(1e-3, 1.0, BATCH)
    v = rademacher(jax.random.split(jax.random.key(2), BATCH), x)

    def derivatives(model: ScoreModel) -> tuple[jax.Array, jax.Array]:
        score_fn = model.score(params)
        return jax.jit(lambda y, u: jax.jvp(lambda z: score_fn(z, t), (y,), (u,)))(x, v)

    pairs = zip(derivatives(coarse), derivatives(exact), strict=True)
    found = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]
    return sum(leaf.size for leaf in jax.tree.leaves(params)), *found


def main() -> None:
    """Print the table of the errors of s and Hv by the number of blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default="1,2,4,8", help="residual blocks of a level")
    parser.add_argument("--nf", type=int, default=32)
    options = parser.parse_args()
    print("| blocks per level | parameters | error of s | error of Hv |")
    print("|---|---|---|---|")
    for blocks in map(int, options.blocks.split(",")):
        number, score, hv = errors(blocks, options.nf)
        print(f"| {blocks} | {number:,} | {score:.4f} | {hv:.4f} |")


if __name__ == "__main__":
    main()
