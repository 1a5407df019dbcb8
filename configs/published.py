"""Build the published configs as deltas over `base.py`; each family is one paper's code.

A published run of `continuous=False` trains on discrete levels. `eval.begin_ckpt`, `end_ckpt` stay
0 (the latest checkpoint) where the published codes name the last one by its number.
"""

from ml_collections import ConfigDict

from configs import base

SMALLEST_TIME = {"vpsde": 1e-5, "subvpsde": 1e-2, "vesde": 1e-5}
SAMPLING_TIME = {"vpsde": 1e-3, "subvpsde": 1e-2, "vesde": 1e-5}


def images(sde: str, dataset: str, image_size: int = 32, category: str = "") -> ConfigDict:
    """Fields that all published image configs share."""
    config, ve = base.get_config(), sde == "vesde"
    config.data.update(dataset=dataset, image_size=image_size, num_channels=3, category=category)
    config.data.update(centered=not ve, uniform_dequantization=False, random_flip=True)
    config.training.update(sde=sde, smallest_time=SMALLEST_TIME[sde], log_freq=100, eval_freq=100)
    config.training.update(snapshot_freq=50_000, snapshot_freq_for_preemption=10_000)
    config.sampling.update(smallest_time=SAMPLING_TIME[sde], rtol=1e-5, atol=1e-5)
    config.eval.update(rtol=1e-5, atol=1e-5)
    published = dataset in ("cifar10", "celeba", "lsun", "imagenet")  # statistics; with sampling
    config.eval.features = "inception" if published else ""
    config.model.ema_rate = 0.999 if ve else 0.9999
    if dataset == "imagenet":  # the dequantiser of ImageNet 32; that of CIFAR-10 is the default
        config.deq.update(filters=128, blocks=8, couplings=8, processor="deep")
    if ve:
        config.model.update(parameterization="scaled_score", time_label="sigma")
        config.model.update(sigma_min=0.01, sigma_max=50.0)
    return config


def ddpmpp(config: ConfigDict, *, blocks: int = 4, dropout: float = 0.1) -> None:
    """Set the fields of the network DDPM++."""
    config.model.update(name="ncsnpp", nf=128, ch_mult=(1, 2, 2, 2), num_res_blocks=blocks)
    config.model.update(attn_resolutions=(16,), dropout=dropout, fir=False)


def ncsnpp(config: ConfigDict, *, blocks: int = 4, dropout: float = 0.1) -> None:
    """NCSN++: FIR filters, a residual pyramid of the input; Fourier embedding of σ for VE."""
    ddpmpp(config, blocks=blocks, dropout=dropout)
    config.model.update(fir=True, progressive_input="residual")
    if config.model.time_label == "sigma":
        config.model.update(embedding_type="fourier")


def ncsnpp_256(config: ConfigDict, sigma_max: float) -> None:
    """NCSN++ for 256×256: both pyramids by sums, 2000 noise levels."""
    ncsnpp(config, blocks=2, dropout=0.0)
    config.model.update(ch_mult=(1, 1, 2, 2, 2, 2, 2), sigma_max=sigma_max, num_scales=2000)
    config.model.update(progressive="output_skip", progressive_input="input_skip")


def ncsnpp_1024(config: ConfigDict) -> None:
    """Set the fields of NCSN++ for images of 1024×1024, in batches of 8."""
    ncsnpp_256(config, 1348.0)
    config.model.update(nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1)
    config.model.ema_rate = 0.9999
    config.training.batch_size = 8


def ddpm(config: ConfigDict, *, dropout: float = 0.1) -> None:
    """The U-Net of Ho et al. in the form of score_sde."""
    config.model.update(name="ddpm", nf=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2)
    config.model.update(attn_resolutions=(16,), dropout=dropout)


def ddpm_256(config: ConfigDict) -> None:
    """The same for 256×256."""
    ddpm(config, dropout=0.0)
    config.model.ch_mult = (1, 1, 2, 2, 4, 4)
    config.optim.lr = 2e-5


def ncsnv2(config: ConfigDict, name: str, sigma_max: float, num_scales: int) -> None:
    """NCSNv2 trained as SMLD, sampled by annealed Langevin dynamics."""
    config.model.update(name=name, nf=128, time_label="sigma")
    config.model.update(sigma_max=sigma_max, num_scales=num_scales)
    config.optim.update(lr=1e-4, warmup=0, grad_clip=-1.0)
    config.training.continuous = False
    config.sampling.update(predictor="none", corrector="ald")


def discrete(config: ConfigDict, predictor: str) -> None:
    """The objective and the sampler of a discrete chain."""
    config.training.continuous = False
    config.sampling.predictor = predictor
    if config.training.sde == "vesde":
        config.model.time_label = "reverse_index"
    if config.model.name == "ncsnpp":
        config.model.embedding_type = "positional"


def mle_score_ode(sde: str, dataset: str, image_size: int = 32, category: str = "") -> ConfigDict:
    """Lu et al. 2022: batch 48, the size for order 3; order 1 unless the command line says more."""
    config = images(sde, dataset, image_size, category)
    config.training.update(batch_size=48, n_iters=1_400_001)
    config.eval.update(batch_size=2000 if dataset == "cifar10" else 1024, bound=False)
    config.eval.update(num_repeats=5 if dataset == "cifar10" else 1, num_samples=50_000)
    config.eval.enable_sampling = dataset == "cifar10"
    config.data.random_flip = dataset != "imagenet"
    if sde == "vpsde" and dataset == "imagenet":
        config.training.importance_smallest_time = 5e-5
    return config


def score_flow(sde: str, dataset: str) -> ConfigDict:
    """Song et al. 2021: batch 128, five steps per dispatch."""
    config = mle_score_ode(sde, dataset)
    config.training.update(batch_size=128, n_iters=1_300_001, n_jitted_steps=5)
    config.eval.update(batch_size=1024, enable_sampling=False)
    return config


def score_sde(sde: str, dataset: str, image_size: int = 32, category: str = "") -> ConfigDict:
    """Song et al. 2021: predictor-corrector sampling; VE with half the sum over dimensions."""
    config = images(sde, dataset, image_size, category)
    config.training.update(batch_size=128, n_iters=1_300_001, n_jitted_steps=5)
    config.training.update(log_freq=50, reduce_mean=sde != "vesde", smallest_time=1e-5)
    config.sampling.smallest_time = 1e-5 if sde == "vesde" else 1e-3
    config.sampling.update(method="pc", predictor="euler_maruyama", corrector="none")
    config.eval.update(batch_size=1024, enable_loss=True, enable_bpd=False, bound=False)
    config.eval.update(enable_sampling=dataset != "cifar10", num_samples=50_000, num_repeats=5)
    if sde == "vesde":
        config.sampling.update(predictor="reverse_diffusion", corrector="langevin", snr=0.16)
    if image_size >= 128:
        config.training.update(batch_size=64, n_iters=2_400_001)
        config.training.snapshot_freq_for_preemption = 5000
        config.sampling.snr = 0.075
        config.eval.batch_size = 512
    return config


def fp_diffusion() -> ConfigDict:
    """Lai et al. 2023: VP on CIFAR-10, batch 48, likelihood weighting, the vector term.

    The published weight 0.15 is that of (‖eps‖/d)², here of (‖eps‖/√d)²: divided by d. Not taken
    over: the published scalar term, which is the residual of no equation of the density, and times
    down to 1e-5, where the residual grows like a power of 1/σ.
    """
    config = score_sde("vpsde", "cifar10")
    config.training.update(batch_size=48, n_jitted_steps=1, likelihood_weighting=True)
    config.training.update(scalar_fp="False", fp_wgt_type="ll", alpha=0.15 / 3072, m=2.0)
    config.training.smallest_time = 1e-3
    return config


def sdeflow() -> ConfigDict:
    """Huang et al. 2021: the drift ELBO in logit space; no warm-up, no clipping, no average."""
    config = base.get_config()
    config.data.update(logit=True, centered=False, uniform_dequantization=True)
    config.model.update(name="ddpm", parameterization="drift", time_label="unit_time")
    config.model.update(num_res_blocks=2, attn_resolutions=(16,), up_attention="every")
    config.model.update(downsample_padding="symmetric", init_mode="fan_out", ema_rate=0.0)
    config.model.dropout_mode = "channel"
    config.training.update(reduce_mean=False, n_jitted_steps=1, log_freq=500, eval_freq=2000)
    config.training.snapshot_freq_for_preemption = 1000
    config.optim.update(lr=1e-4, warmup=0, grad_clip=-1.0)
    config.sampling.update(method="sde", smallest_time=1e-5, noise_removal=False)
    config.eval.update(elbo=True, bound=False, enable_bpd=False, batch_size=256)
    return config
