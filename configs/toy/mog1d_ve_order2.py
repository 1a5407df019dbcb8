"""Train an MLP on three Gaussians under the VE SDE by score matching of order 2.

The weights are the published ones.

Command: python main.py --config=configs/toy/mog1d_ve_order2.py \
             --workdir=runs/mog1d_2 --mode=train,eval,diagnose
Expected: after 5,000 steps (--config.training.n_iters=5000 .snapshot_freq=5000), mean ± s.e. of
5 seeds, two CPU cores: KL(data ‖ ODE) 0.0049 ± 0.0006 nats, ODE −0.1242 ± 0.0006 nats.
"""

from ml_collections import ConfigDict

from configs.toy import mog1d_ve_order1


def get_config() -> ConfigDict:
    """Order 1 and the terms of order 2, from exact Jacobians."""
    config = mog1d_ve_order1.get_config()
    config.training.update(score_matching_order=2, second_order_weight=0.5, trace_weight=0.0)
    return config
