"""Train NCSN++ on LSUN church 256×256 under the VE SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/church_ncsnpp_continuous.py \
             --workdir=runs/church_ncsnpp_continuous --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vesde", "lsun", 256, "church_outdoor")
    published.ncsnpp_256(config, 380.0)
    return config
