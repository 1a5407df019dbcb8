"""Train a larger U-Net than in `sharp.py` with the head `cells` on MNIST on one GPU.

The data are an .npz file with x_train and x_test.

Command: python main.py --config=configs/mnist/sharp_gpu.py --workdir=runs/mnist_sharp_gpu
         --mode=train,eval --config.data.path=mnist.npz
For one GPU; it has not been run on one. Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs.mnist import sharp


def get_config() -> ConfigDict:
    """A U-Net of 128 to 256 channels with attention at 7×7, dropout and a smaller step."""
    config = sharp.get_config()
    config.model.update(channels=(128, 192, 256), blocks=(2, 3, 4), attention=True, dropout=0.1)
    config.model.update(ema_rate=0.9995)
    config.training.update(n_iters=60_000, batch_size=128)
    config.training.update(snapshot_freq=60_000, snapshot_freq_for_preemption=5000)
    config.optim.update(lr=1e-3, warmup=1000, weight_decay=1e-3)
    config.eval.update(batch_size=500, num_times=64, enable_bpd=True)
    return config
