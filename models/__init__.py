"""Networks (x: [B, *d], label: [B]) ↦ [B, *d] that know nothing of diffusions and mix no batch.

`label` is the time conditioning as the caller computed it (999 t, log-SNR, σ, …). `MODELS`
resolves `model.name`; every field of a network is a plain value: `MODELS[name](**section)`.
"""

from models.concat_mlp import ConcatMLP
from models.ddpm import DDPM
from models.mlp import MLP
from models.ncsnpp import NCSNpp
from models.ncsnv2 import NCSNv2, NCSNv2Deeper, NCSNv2Deepest
from models.unet import UNet

MODELS = {
    "mlp": MLP,
    "concat_mlp": ConcatMLP,
    "ddpm": DDPM,
    "ncsnpp": NCSNpp,
    "unet": UNet,
    "ncsnv2_64": NCSNv2,
    "ncsnv2_128": NCSNv2Deeper,
    "ncsnv2_256": NCSNv2Deepest,
}

__all__ = ["DDPM", "MLP", "MODELS", "ConcatMLP", "NCSNpp", "NCSNv2", "UNet"]
