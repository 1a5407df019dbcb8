"""Train a drift network on the Swiss roll under the VP SDE by implicit score matching.

This objective is the ELBO itself.

Command: python main.py --config=configs/toy/swissroll_drift_ism.py \
             --workdir=runs/swissroll_ism --mode=train,eval
Expected: −ELBO 2.0482 ± 0.0054 nats (mean ± s.e. of 5 seeds, 10,000 points, two CPU cores). Five of
50,000 points start outside the model and their ODE diverges, so look at the ELBO, not at the ODE,
which starts at 1e-3 here, at the smallest time of the debiased law.
"""

from ml_collections import ConfigDict

from configs.toy import swissroll_drift


def get_config() -> ConfigDict:
    """Times of the debiased law, exact divergence."""
    config = swissroll_drift.get_config()
    config.training.update(objective="ism", debias=True, smallest_time=1e-3)
    config.training.derivative_estimator = "exact"
    return config
