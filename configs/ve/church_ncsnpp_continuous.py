"""Train NCSN++ on LSUN church 256×256 under the VE SDE by score matching of order 1, 2 or 3.

Paper: Lu et al. 2022, https://arxiv.org/abs/2206.08265
Command: python main.py --config=configs/ve/church_ncsnpp_continuous.py \
             --workdir=runs/church_ncsnpp_continuous --mode=train
Hardware: GPUs with room for batch 50 at 256×256; hours not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.mle_score_ode("vesde", "lsun", 256, "church_outdoor")
    published.ncsnpp_256(config, 380.0)
    config.training.update(batch_size=50, n_iters=3_400_001, snapshot_freq_for_preemption=5000)
    config.sampling.update(method="pc", predictor="reverse_diffusion", corrector="langevin")
    config.sampling.snr = 0.075
    config.eval.update(batch_size=100, num_repeats=5)
    return config
