"""Train DDPM++ on CIFAR-10 under the VP SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/vp/cifar10_ddpmpp_continuous.py \
             --workdir=runs/cifar10_ddpmpp_continuous --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here; published FID 2.55, 3.16 bits/dim.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of DDPM++ on CIFAR-10 under the VP SDE."""
    config = published.score_sde("vpsde", "cifar10")
    published.ddpmpp(config)
    return config
