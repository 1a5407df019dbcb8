"""Train NCSN++ on CIFAR-10 under the VP SDE with the Fokker–Planck regulariser.

Paper: Lai et al. 2023, https://arxiv.org/abs/2210.04296
Command: python main.py --config=configs/fp_diffusion/vp/cifar10_ncsnpp_continuous.py \
             --workdir=runs/cifar10_ncsnpp_continuous --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.fp_diffusion()
    published.ncsnpp(config)
    return config
