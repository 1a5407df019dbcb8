"""Train DDPM++ on CIFAR-10 under the sub-VP SDE, as in score_flow.

Paper: Song et al. 2021, https://arxiv.org/abs/2101.09258
Command: python main.py --config=configs/score_flow/subvp/cifar10_ddpmpp_continuous.py \
             --workdir=runs/cifar10_ddpmpp_continuous --mode=train
Hardware: hours not published.
Expected: not reproduced here; 2.83 bits/dim is the best published on CIFAR-10.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_flow("subvpsde", "cifar10")
    published.ddpmpp(config)
    return config
