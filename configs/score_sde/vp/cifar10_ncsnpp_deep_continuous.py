"""Train deep NCSN++ on CIFAR-10 under the VP SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/vp/cifar10_ncsnpp_deep_continuous.py \
             --workdir=runs/cifar10_ncsnpp_deep_continuous --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vpsde", "cifar10")
    published.ncsnpp(config, blocks=8)
    config.training.n_iters = 950_001
    return config
