"""Train deep DDPM++ on CIFAR-10 under the sub-VP SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/subvp/cifar10_ddpmpp_deep_continuous.py \
             --workdir=runs/cifar10_ddpmpp_deep_continuous --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here; published FID 2.41, 2.99 bits/dim.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("subvpsde", "cifar10")
    published.ddpmpp(config, blocks=8)
    config.training.n_iters = 950_001
    return config
