"""Train NCSN++ on CIFAR-10 under the VE SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/cifar10_ncsnpp_continuous.py \
             --workdir=runs/cifar10_ncsnpp_continuous --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here; published FID 2.38.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of NCSN++ on CIFAR-10 under the VE SDE."""
    config = published.score_sde("vesde", "cifar10")
    published.ncsnpp(config)
    return config
