"""Train NCSN++ on FFHQ 1024×1024 under the VE SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/ffhq_ncsnpp_continuous.py \
             --workdir=runs/ffhq_ncsnpp_continuous --mode=train \
             --config.data.path=DIR
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vesde", "ffhq", 1024)
    published.ncsnpp_1024(config)
    config.sampling.snr = 0.15
    config.eval.batch_size = 1024
    config.training.reduce_mean = True
    return config
