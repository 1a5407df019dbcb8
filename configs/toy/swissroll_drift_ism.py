"""Swiss roll, the drift network trained by implicit score matching, which is the ELBO itself.

Command: python main.py --config=configs/toy/swissroll_drift_ism.py \
             --workdir=runs/swissroll_ism --mode=train,eval
Expected: not reproduced here yet; no model can have an ELBO above −1.967 nats.
"""

from ml_collections import ConfigDict

from configs.toy import swissroll_drift


def get_config() -> ConfigDict:
    """Times of the debiased law, exact divergence."""
    config = swissroll_drift.get_config()
    config.training.update(objective="ism", debias=True, smallest_time=1e-3)
    config.training.derivative_estimator = "exact"
    return config
