"""Train DDPM on CIFAR-10 under the sub-VP SDE.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/subvp/cifar10_ddpm_continuous.py \
             --workdir=runs/cifar10_ddpm_continuous --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here; published FID 3.56 by the ODE, 3.05 bits/dim.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of DDPM on CIFAR-10 under the sub-VP SDE."""
    config = published.score_sde("subvpsde", "cifar10")
    published.ddpm(config)
    return config
