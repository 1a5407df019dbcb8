"""Train NCSNv2 on LSUN bedroom 128×128 with the SMLD objective.

Paper: Song et al. 2021, https://arxiv.org/abs/2011.13456
Command: python main.py --config=configs/score_sde/ve/ncsnv2/bedroom.py \
             --workdir=runs/bedroom --mode=train
Hardware: hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.score_sde("vesde", "lsun", 128, "bedroom")
    published.ncsnv2(config, "ncsnv2_128", 190.0, 1086)
    config.training.batch_size = 128
    config.model.ema_rate = 0.9999
    config.sampling.update(n_steps_each=3, snr=0.095)
    return config
