"""Train a drift network on CIFAR-10 in logit space, and evaluate its ELBO.

Paper: Huang et al. 2021, https://arxiv.org/abs/2106.02808
Command: python main.py --config=configs/sdeflow/cifar10.py \
             --workdir=runs/cifar10 --mode=train
Hardware: published 14 hours on one V100.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.sdeflow()
    config.data.update(dataset="cifar10", image_size=32, num_channels=3, random_flip=True)
    config.model.update(nf=128, ch_mult=(1, 2, 2, 2))
    config.training.update(batch_size=128, n_iters=100_000, snapshot_freq=20_000)
    return config
