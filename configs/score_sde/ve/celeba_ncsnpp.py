"""Train NCSN++ on CelebA 64×64 with the SMLD objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/celeba_ncsnpp.py \
             --workdir=runs/celeba_ncsnpp --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vesde", "celeba", 64)
    published.ncsnpp(config)
    published.discrete(config, "reverse_diffusion")
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    return config
