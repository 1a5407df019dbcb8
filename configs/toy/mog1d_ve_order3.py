"""Three Gaussians on the line, VE SDE, score matching of order 3, published weights.

Command: python main.py --config=configs/toy/mog1d_ve_order3.py \
             --workdir=runs/mog1d_3 --mode=train,eval,diagnose
Expected: not reproduced here yet.
"""

from ml_collections import ConfigDict

from configs.toy import mog1d_ve_order2


def get_config() -> ConfigDict:
    """Order 2 and the terms of order 3, from exact Jacobians."""
    config = mog1d_ve_order2.get_config()
    config.training.update(score_matching_order=3, third_order_weight=0.1)
    return config
