"""Train NCSNv2 on CelebA 64×64 with the SMLD objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/ncsnv2/celeba.py \
             --workdir=runs/celeba --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of NCSNv2 on CelebA 64×64 with the SMLD objective."""
    config = published.score_sde("vesde", "celeba", 64)
    published.ncsnv2(config, "ncsnv2_64", 90.0, 500)
    config.sampling.update(n_steps_each=5, snr=0.128)
    return config
