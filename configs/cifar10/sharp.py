"""Train a network with the head `cells` on CIFAR-10, in the size of the network of VDM.

The network has no downsampling.

Paper: Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix B, whose network has 64 blocks
of 128 channels and whose bound is 2.65 bits/dim after 10 M steps of 128.
Command: python main.py --config=configs/cifar10/sharp.py --workdir=runs/cifar10_sharp
         --mode=train,eval
For eight GPUs; not run, its hours are not known. Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """64 residual blocks of 128 channels at 32×32 (about 20 M parameters)."""
    config = base.get_config()
    config.data.update(dataset="cifar10", image_size=32, num_channels=3)
    config.model.update(name="unet", parameterization="cells", time_label="log_snr", gain=3.0)
    config.model.update(channels=(128,), blocks=(64,), dropout=0.1, ema_rate=0.9999)
    config.model.update(dtype="bfloat16", remat="keep_convs")
    config.training.update(n_iters=2_000_000, batch_size=128, stratified=True)
    config.training.update(likelihood_weighting=True, time_law="adaptive")
    config.training.update(snapshot_freq=100_000, snapshot_freq_for_preemption=5000)
    config.optim.update(lr=2e-4, warmup=5000, weight_decay=0.01)
    config.eval.update(batch_size=256, num_times=64, features="inception", num_samples=50_000)
    return config
