"""Train DDPM++ on ImageNet 32×32 under the VP SDE, as in score_flow.

Paper: Song et al. 2021, https://arxiv.org/abs/2101.09258
Command: python main.py --config=configs/score_flow/vp/imagenet32_ddpmpp_continuous.py \
             --workdir=runs/imagenet32_ddpmpp_continuous --mode=train
Hardware: hours not published.
Expected: not reproduced here; 3.76 bits/dim is the best published on ImageNet 32×32.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_flow("vpsde", "imagenet")
    published.ddpmpp(config, dropout=0.0)
    return config
