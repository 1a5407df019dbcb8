"""Train a network with the head `cells` on ImageNet 32×32, in the size of the network of VDM.

The network has no downsampling.

Paper: Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix B, whose network has 64 blocks
of 256 channels and whose bound is 3.72 bits/dim; Zheng et al. 2023,
https://arxiv.org/abs/2305.03935, 3.69 by the ODE.
Command: python main.py --config=configs/imagenet32/sharp.py --workdir=runs/imagenet32_sharp
         --mode=train,eval
For eight GPUs; not run, its hours are not known. Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs.cifar10 import sharp


def get_config() -> ConfigDict:
    """64 residual blocks of 256 channels at 32×32 (about 78 M parameters), no dropout."""
    config = sharp.get_config()
    config.data.update(dataset="imagenet")
    config.model.update(channels=(256,), dropout=0.0)
    config.training.update(batch_size=512)
    return config
