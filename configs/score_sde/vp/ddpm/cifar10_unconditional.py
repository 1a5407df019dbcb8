"""Train DDPM without a time label on CIFAR-10 with the DDPM objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/vp/ddpm/cifar10_unconditional.py \
             --workdir=runs/cifar10_unconditional --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vpsde", "cifar10")
    published.ddpm(config)
    published.discrete(config, "ancestral_sampling")
    config.model.conditional = False
    return config
