"""Every field that a config may have, with its default; an experiment is a delta over this file.

A field that is None in `model` takes the default of the network or SDE that has it; one that is set
must belong to the chosen network or SDE. Change any field on the command line:
`--config.training.batch_size=64`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Return a config in which every field has its default."""
    config = ConfigDict()
    config.seed = 42
    config.data = _data()
    config.model = _model()
    config.training = _training()
    config.optim = _optim()
    config.deq = _deq()
    config.sampling = _sampling()
    config.eval = _eval()
    return config


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": "digits",  # a name in datasets.DATASETS
            "path": "",  # of an .npz file, an image folder, or a tfds folder
            "image_size": 0,  # pixels; 0: as the data are
            "num_channels": 1,
            "category": "",  # of lsun, as church_outdoor
            "levels": 256,  # number of grey levels
            "centered": True,  # [0, 1] to [−1, 1]
            "logit": False,  # logit transform instead of centring
            "uniform_dequantization": True,  # (k + u)/levels in training, too
            "random_flip": False,  # left-right, in training only
            "num_validation": 0,  # training images, drawn at random, to choose settings by
            "num_train": 0,  # 0: all (2-D sets: fresh samples for ever)
            "num_test": 0,  # 0: all (2-D sets: at least 1)
        }
    )


def _model() -> ConfigDict:
    return ConfigDict(
        {
            "name": "ddpm",  # a name in models.MODELS
            # score | scaled_score | noise | drift | velocity, or a head, which knows the marginal
            # law of the training data: cells | atoms (integers), mixture | whitened (real values)
            "parameterization": "noise",
            "time_label": "time",  # time | level | unit_time | sigma | log_snr | reverse_index
            "ema_rate": 0.9999,
            "num_scales": 1000,  # noise levels of the discrete chains and of sampling
            # SDEs
            "beta_min": placeholder(float),
            "beta_max": placeholder(float),
            "sigma_min": placeholder(float),
            "sigma_max": placeholder(float),
            "end": placeholder(float),  # largest time of the linear path, below 1
            # heads
            "rank": placeholder(int),  # cells, atoms: features per coordinate, from 30 levels on
            "components": placeholder(int),  # mixture: Gaussians per coordinate
            "floor": placeholder(float),  # mixture: smallest width, in standard deviations
            "whitening": placeholder(str),  # whitened: full | diagonal covariance
            # networks
            "dropout": placeholder(float),
            "hidden": placeholder(int),
            "depth": placeholder(int),
            "embed_dim": placeholder(int),
            "activation": placeholder(str),
            "nf": placeholder(int),
            "ch_mult": placeholder(tuple),
            "num_res_blocks": placeholder(int),
            "attn_resolutions": placeholder(tuple),
            "resamp_with_conv": placeholder(bool),
            "conditional": placeholder(bool),
            "nonlinearity": placeholder(str),
            "num_groups": placeholder(int),
            "up_attention": placeholder(str),
            "downsample_padding": placeholder(str),
            "init_mode": placeholder(str),
            "dropout_mode": placeholder(str),
            "fir": placeholder(bool),
            "fir_kernel": placeholder(tuple),
            "skip_rescale": placeholder(bool),
            "resblock_type": placeholder(str),  # ddpm | biggan
            "progressive": placeholder(str),  # none | output_skip | residual
            "progressive_input": placeholder(str),  # none | input_skip | residual
            "progressive_combine": placeholder(str),  # sum | cat
            "embedding_type": placeholder(str),  # positional | fourier
            "fourier_scale": placeholder(float),
            "trainable_embedding": placeholder(bool),
            "init_scale": placeholder(float),
            "widths": placeholder(tuple),
            "channels": placeholder(tuple),  # unet: of every level, from the finest
            "blocks": placeholder(tuple),  # unet: number in every level
            "patch": placeholder(int),  # unet: pixels on a side of a position of the finest level
            "attention": placeholder(bool),  # unet: at the coarsest level
            "summary": placeholder(int),  # unet: width of a perceptron of the whole input
            "dtype": placeholder(str),  # float32 | bfloat16, of convolutions and products
            "remat": placeholder(str),  # none | block | keep_convs
        }
    )


def _training() -> ConfigDict:
    return ConfigDict(
        {
            "objective": "dsm",  # dsm | ism (implicit score matching, the ELBO)
            "sde": "vpsde",  # vpsde | subvpsde | vesde | linearvesde | linear
            "continuous": True,  # False: times are model.num_scales levels (DDPM, SMLD; VP, VE)
            "n_iters": 1_300_001,
            "batch_size": 128,  # over all devices and hosts
            "microbatch": 0,  # examples at a time, over all devices and hosts; 0: the whole batch
            "n_jitted_steps": 1,  # steps per dispatch
            "profile_steps": 0,  # steps to trace into <workdir>/profile, after compilation
            "reduce_mean": True,  # mean over dimensions; False: half the sum
            "likelihood_weighting": False,  # weight g²
            "importance_weighting": False,  # and times from p(t) ∝ g²/σ²
            "debias": False,  # times from the truncated law of the drift ELBO
            "stratified": False,  # one time per cell of a batch
            # law of the times by name, for likelihood_weighting: uniform | importance | debias |
            # velocity (log σ² uniform) | adaptive (learns where the loss varies); '': as switched
            "time_law": "",
            "score_matching_order": 1,  # 1 | 2 | 3; order k contains order k − 1
            "second_order_weight": 1.0,  # of frobenius + trace_weight × trace
            "frobenius_weight": 1.0,  # of its parts; 0 and 1: the quadratic form alone (i-DODE)
            "trace_weight": 1.0,
            "third_order_weight": 1.0,
            "third_order_form": "gradient",  # gradient | directional (cheaper, forward only)
            "high_order_fraction": 1.0,  # of the batch that has orders 2 and 3: 1, 1/2, 1/3, ...
            "derivative_estimator": "probe",  # probe | exact (small dimensions): ism, orders 2, 3
            "num_probes": 1,  # Rademacher probes per example of the same
            # Fokker-Planck regulariser: alpha (|eps|/sqrt(d))^m + beta (|L|/d)^m, times w(t)
            "alpha": 0.0,  # of the vector term; 0: off
            "beta": 0.0,  # of the scalar term; 0: off
            "scalar_fp": "both",  # True (scalar term alone) | False (vector alone) | both
            "fp_wgt_type": "ll",  # constant 1 | convention g | ll g^2 | dimensionless
            "m": 2.0,
            "fp_form": "gradient",  # gradient | advective (cheaper, forward only)
            "fp_probes": 1,  # 1 | 2 (unbiased square)
            "fp_fraction": 1.0,  # of the batch: 1, 1/2, 1/3, ...
            "fp_every": 1,  # steps
            "smallest_time": 1e-5,  # of training, bound and ODE likelihood
            "importance_smallest_time": 0.0,  # ... instead, with importance, velocity, adaptive
            "log_freq": 100,  # steps between records of the training loss
            "eval_freq": 1000,  # ... of the held-out loss
            "snapshot_freq_for_preemption": 5000,  # ... between checkpoints; two are kept
            "snapshot_freq": 50_000,  # ... between checkpoints that are kept for ever
            "snapshot_sampling": True,  # samples beside each of the latter
            "init_from": "",  # a run folder or published checkpoint (Flax, .pth) to start from
        }
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "optimizer": "Adam",
            "lr": 2e-4,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,  # decoupled
            "warmup": 5000,  # steps
            "grad_clip": 1.0,  # global norm; negative: off
            "schedule": "constant",  # constant | cosine
        }
    )


def _deq() -> ConfigDict:
    return ConfigDict(
        {
            # --mode=train_deq: the Flow++ dequantiser; batch size and optimizer as in training
            "n_iters": 300_001,
            "ema_rate": 0.99,
            "num_times": 1,  # times per example of the bound that is minimised
            "filters": 96,
            "components": 32,  # logistics per dimension
            "blocks": 2,
            "heads": 4,
            "couplings": 4,
            "processor": "shallow",  # shallow | deep
            "init_from": "",  # a published DeqState to start from
        }
    )


def _sampling() -> ConfigDict:
    return ConfigDict(
        {
            "method": "ode",  # ode | pc | sde
            "smallest_time": 1e-3,
            "noise_removal": True,  # last step: E[x0 | x_t]
            "predictor": "euler_maruyama",  # pc
            "corrector": "none",
            "snr": 0.16,
            "n_steps_each": 1,
            "probability_flow": False,
            "lmbd": 0.0,  # sde: λ <= 1
            "solver": "tsit5",  # ode
            "rtol": 1e-4,
            "atol": 1e-4,
            # --mode=sample
            "num_samples": 16,  # in all; with a task, of every measurement
            "context": "",  # a class | test (that of test examples) | an .npy file; '': none
            "guidance": 1.0,  # w of s + w (s_c - s), with a context; 1: the conditional score
            # y = A x + noise: inpaint | colourise | super_resolve | denoise | linear; '': no y
            "task": "",
            # replacement | dps | moment_matching | twisted (exact for many particles)
            "task_method": "moment_matching",
            "measurements": "",  # an .npy file of y; '': of the first test examples, ...
            "num_measured": 4,  # ... so many
            "mask": "",  # inpaint: what is missing, top,left,height,width or an .npy of booleans
            "factor": 2,  # super_resolve: pixels on a side of a block
            "matrix": "",  # linear: an .npy file of A, one row per measured number
            "noise": 0.05,  # of y, in the units of the model: images have [-1, 1]
            "particles": 64,  # twisted: of every sample
        }
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        {
            "begin_ckpt": 0,  # evaluate checkpoints begin..end × training.snapshot_freq;
            "end_ckpt": 0,  # 0: the latest only
            "batch_size": 256,
            "dataset": "test",  # train | validation | test
            "num_examples": 0,  # the first so many of the split; 0: all
            "num_repeats": 1,  # draws of dequantisation, probe and times per example
            "wait_s": 0.0,  # seconds to wait for a checkpoint that training has yet to write
            "dequantization": "uniform",  # uniform | variational | tn, or several: uniform,tn
            "dequantizer": False,  # published name of dequantization=variational
            "tn_tau": 3.0,  # tn: half a cell in standard deviations of the noise at the start
            "enable_bpd": True,  # log-likelihood by the probability-flow ODE
            # data, taken for x at t_min, as published | noised (a bound) | auto: noised where the
            # head has a decoder of its own
            "ode_start": "auto",
            "num_importance": 1,  # ODE: draws of the noise that are averaged in p, not in log p
            "bound": True,  # variational bound
            "dsm": True,  # of the bound: denoising form; False: with divergence
            "offset": True,  # of the bound: with the way from x at t_min to x
            "elbo": False,  # ELBO of the plug-in reverse SDE on [0, T] (drift networks)
            "elbo_estimator": "low_variance",  # low_variance | published
            "baselines": True,  # beside likelihoods: uniform, histogram, Gaussians of training data
            "enable_loss": False,  # training objective
            "enable_sampling": True,
            "num_samples": 100,
            "features": "",  # for FID, KID, IS: inception | classifier | a SavedModel folder
            "stats": "",  # file of reference statistics; '': that of data and features
            "solver": "dopri5",  # tsit5 | dopri5 | dopri8 | bosh3 | heun
            "rtol": 3e-5,
            "atol": 3e-5,
            "num_steps": 0,  # equal steps, the same for all examples; 0: by the tolerances
            "estimate_error": True,  # of equal steps, for half as many evaluations again
            "divergence": "rademacher",  # rademacher | gaussian | exact
            "num_probes": 1,
            "num_times": 64,  # times per example of bound and ELBO
            "trajectory_lmbds": (0.0, 0.5, 1.0, -1.0),  # λ of the figure of toy trajectories
            "curve_times": 32,  # --mode=diagnose: times of a curve
            "curve_examples": 256,  # ... and examples at each
        }
    )
