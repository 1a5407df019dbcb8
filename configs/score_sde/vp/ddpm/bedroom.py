"""Train DDPM on LSUN bedroom 256×256 with the DDPM objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/vp/ddpm/bedroom.py \
             --workdir=runs/bedroom --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vpsde", "lsun", 256, "bedroom")
    published.ddpm_256(config)
    published.discrete(config, "ancestral_sampling")
    return config
