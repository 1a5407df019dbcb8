"""Train NCSNv2 on CIFAR-10 with the SMLD objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/ncsnv2/cifar10.py \
             --workdir=runs/cifar10 --mode=train
Hardware: published on 4 V100, 0.2 s per step (NCSN++, VE).
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of NCSNv2 on CIFAR-10 with the SMLD objective."""
    config = published.score_sde("vesde", "cifar10")
    published.ncsnv2(config, "ncsnv2_64", 50.0, 232)
    config.sampling.update(n_steps_each=5, snr=0.176)
    return config
