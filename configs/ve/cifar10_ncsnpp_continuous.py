"""Train NCSN++ on CIFAR-10 under the VE SDE by score matching of order 1, 2 or 3.

Paper: Lu et al. 2022, https://arxiv.org/abs/2206.08265
Command: python main.py --config=configs/ve/cifar10_ncsnpp_continuous.py \
             --workdir=runs/cifar10_ncsnpp_continuous --mode=train
Hardware: GPUs with room for batch 48; hours not published.
Expected: not reproduced here; orders by --config.training.score_matching_order=2 or 3.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.mle_score_ode("vesde", "cifar10")
    published.ncsnpp(config)
    config.training.n_iters = 4_000_001
    return config
