"""Train an MLP on three Gaussians under the VE SDE by score matching of order 3.

The weights are the published ones.

Command: python main.py --config=configs/toy/mog1d_ve_order3.py \
             --workdir=runs/mog1d_3 --mode=train,eval,diagnose
Expected: after 5,000 steps (--config.training.n_iters=5000 .snapshot_freq=5000), mean ± s.e. of
5 seeds, two CPU cores: KL(data ‖ ODE) 0.0074 ± 0.0008 nats, ODE −0.1217 ± 0.0008 nats.
"""

from ml_collections import ConfigDict

from configs.toy import mog1d_ve_order2


def get_config() -> ConfigDict:
    """Order 2 and the terms of order 3, from exact Jacobians."""
    config = mog1d_ve_order2.get_config()
    config.training.update(score_matching_order=3, third_order_weight=0.1)
    return config
