"""Train a drift network on MNIST 28×28 in logit space, and evaluate its ELBO.

Paper: Huang et al. 2021, https://arxiv.org/abs/2106.02808
Command: python main.py --config=configs/sdeflow/mnist.py \
             --workdir=runs/mnist --mode=train
Hardware: not published.
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import published


def get_config() -> ConfigDict:
    """Return the config of this experiment."""
    config = published.sdeflow()
    config.data.update(dataset="mnist", image_size=28)
    config.model.update(nf=32, ch_mult=(1, 2, 2))
    config.training.update(batch_size=64, n_iters=10_000, snapshot_freq=10_000)
    return config
