"""CelebA 64×64, NCSNv2.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/ncsnv2/celeba.py \
             --workdir=runs/celeba --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """CelebA 64×64, NCSNv2."""
    config = published.score_sde("vesde", "celeba", 64)
    published.ncsnv2(config, "ncsnv2_64", 90.0, 500)
    config.sampling.update(n_steps_each=5, snr=0.128)
    return config
