"""CIFAR-10, sub-VP, deep DDPM++: maximum-likelihood training of orders 1 to 3.

Paper: Lu et al. 2022, https://arxiv.org/abs/2206.08265
Command: python main.py --config=configs/subvp/cifar10_ddpmpp_deep_continuous.py \
             --workdir=runs/cifar10_ddpmpp_deep_continuous --mode=train
Hardware: GPUs with room for batch 48; hours not published.
Expected: not reproduced here; orders by --config.training.score_matching_order=2 or 3.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """CIFAR-10, sub-VP, deep DDPM++: maximum-likelihood training of orders 1 to 3."""
    config = published.mle_score_ode("subvpsde", "cifar10")
    published.ddpmpp(config, blocks=8)
    config.training.n_iters = 950_001
    return config
