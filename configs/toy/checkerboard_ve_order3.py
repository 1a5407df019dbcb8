"""Train an MLP on the checkerboard under the VE SDE by score matching of order 3.

‖C‖²/d³ has the weight 0.1, which is a quarter of the published 0.1 of ‖C‖²/d.

Command: python main.py --config=configs/toy/checkerboard_ve_order3.py \
             --workdir=runs/checkerboard_3 --mode=train,eval,diagnose
Expected: after 4,000 steps (--config.training.n_iters=4000 .snapshot_freq=4000), mean ± s.e. of
5 seeds, two CPU cores: KL(data ‖ ODE) 0.3425 ± 0.0027 nats, ODE 3.8083 ± 0.0027 nats.
"""

from ml_collections import ConfigDict

from configs.toy import checkerboard_ve_order2


def get_config() -> ConfigDict:
    """Order 2 and the terms of order 3, from exact Jacobians."""
    config = checkerboard_ve_order2.get_config()
    config.training.update(score_matching_order=3, third_order_weight=0.1)
    return config
