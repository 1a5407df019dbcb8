"""Train DDPM++ on CIFAR-10 with the DDPM objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/vp/cifar10_ddpmpp.py \
             --workdir=runs/cifar10_ddpmpp --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here; published FID 2.78.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vpsde", "cifar10")
    published.ddpmpp(config)
    published.discrete(config, "ancestral_sampling")
    return config
