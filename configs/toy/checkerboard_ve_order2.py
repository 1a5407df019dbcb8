"""Train an MLP on the checkerboard under the VE SDE by score matching of order 2.

The weights are the published ones.

Command: python main.py --config=configs/toy/checkerboard_ve_order2.py \
             --workdir=runs/checkerboard_2 --mode=train,eval,diagnose
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs.toy import checkerboard_ve_order1


def get_config() -> ConfigDict:
    """Order 1 and the terms of order 2, from exact Jacobians."""
    config = checkerboard_ve_order1.get_config()
    config.training.update(score_matching_order=2, second_order_weight=0.5, trace_weight=0.0)
    return config
