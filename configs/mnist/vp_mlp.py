"""MNIST from an .npz file, as `vp.py`, with a network for two CPU cores: likelihoods, not pictures.

Command: python main.py --config=configs/mnist/vp_mlp.py --workdir=runs/mnist_mlp --mode=train,eval
         --config.data.path=mnist.npz
Expected: the table of dequantisations in the README.
"""

from ml_collections import ConfigDict

from configs import base
from configs.mnist import vp


def get_config() -> ConfigDict:
    """A residual MLP (5 M parameters)."""
    config = vp.get_config()
    model = base.get_config().model
    model.update(name="mlp", parameterization="velocity", time_label="log_snr")
    model.update(hidden=512, depth=4, dropout=0.1, ema_rate=0.999)
    config.model = model
    config.training.update(n_iters=10_000, n_jitted_steps=20)
    config.training.update(snapshot_freq_for_preemption=2000)
    config.optim.update(lr=1e-3, schedule="cosine")
    return config
