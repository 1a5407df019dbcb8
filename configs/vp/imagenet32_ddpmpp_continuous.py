"""Train DDPM++ on ImageNet 32×32 under the VP SDE by score matching of order 1, 2 or 3.

Paper: Lu et al. 2022, https://arxiv.org/abs/2206.08265
Command: python main.py --config=configs/vp/imagenet32_ddpmpp_continuous.py \
             --workdir=runs/imagenet32_ddpmpp_continuous --mode=train
Hardware: GPUs with room for batch 48; hours not published.
Expected: not reproduced here; orders by --config.training.score_matching_order=2 or 3.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.mle_score_ode("vpsde", "imagenet")
    published.ddpmpp(config, dropout=0.0)
    config.training.n_iters = 1_400_001
    return config
