"""Train a U-Net that predicts the velocity on MNIST under the VP SDE.

The data are an .npz file with x_train and x_test, uint8 [n, 28, 28]. The loss is
likelihood-weighted.

Command: python main.py --config=configs/mnist/vp.py --workdir=runs/mnist --mode=train
         --config.data.path=mnist.npz
Expected: not reproduced here (200 steps on two CPU cores take some minutes and show that it runs).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The 28×28 U-Net of the drift-ELBO paper (1.5 M parameters), predicting the velocity."""
    config = base.get_config()
    config.data.update(dataset="npz", path="mnist.npz", image_size=28)
    config.model.update(name="ddpm", parameterization="velocity", time_label="log_snr")
    config.model.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(7,))
    config.model.update(dropout=0.1, ema_rate=0.999)
    config.training.update(n_iters=20_000, batch_size=128)
    config.training.update(likelihood_weighting=True, importance_weighting=True, stratified=True)
    config.training.update(snapshot_freq=10_000, snapshot_freq_for_preemption=1000)
    config.optim.update(lr=2e-4, warmup=500)
    config.deq.update(n_iters=1000, filters=16, components=8, blocks=1, couplings=2)
    config.eval.update(batch_size=128, num_times=32)
    return config
