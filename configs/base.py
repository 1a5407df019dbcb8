"""Every field that a config may have, with its default; an experiment is a delta over this file.

The comment beside a field, or the lines above it, tell its meaning; a comment that ends with a
colon heads the fields below it. `python main.py --describe` prints all of this. A field that is
None in `model` takes the default of the network, head or SDE that has it; one that is set must
belong to the chosen ones. Change any field on the command line: `--config.training.batch_size=64`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Return a config in which every field has its default."""
    config = ConfigDict()
    config.seed = 42  # the seed of all that is drawn: start, order of the data, noise of examples
    config.data = _data()
    config.model = _model()
    config.training = _training()
    config.optim = _optim()
    config.deq = _deq()
    config.classifier = _classifier()
    config.sampling = _sampling()
    config.eval = _eval()
    return config


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": "digits",  # a name in datasets.DATASETS
            "path": "",  # of an .npz, .npy, .csv or .parquet file, an image folder, a tfds folder
            "image_size": 0,  # pixels on a side of the images; 0: as the data are
            "num_channels": 1,  # 1 (grey) | 3 (colour)
            "category": "",  # the category of lsun, as church_outdoor
            # c of p(x | c): class (y_train, y_test of an npz; digits, mnist, cifar10, svhn) |
            # values (context_train, context_test of an npz: numbers [n, *c]); '': p(x)
            "context": "",
            "levels": 256,  # number of grey levels
            "centered": True,  # the network sees [−1, 1]; False: [0, 1]
            "logit": False,  # logit transform instead of centring
            "uniform_dequantization": True,  # (k + u)/levels in training, too
            "random_flip": False,  # left-right, in training only
            # how many training examples, drawn at random, become the validation split
            "num_validation": 0,
            # how many training examples are used; 0: all (2-D sets: fresh samples for ever)
            "num_train": 0,
            "num_test": 0,  # how many test examples are used; 0: all (2-D sets: at least 1)
            # the share of the training examples that becomes the validation split; in place of
            # num_validation
            "validation_fraction": 0.0,
            # the share of all examples that becomes the test split of a file without one; they are
            # drawn at random, the same for every seed
            "test_fraction": 0.1,
            # a file of the numbers of the test examples, counted from 0: .npy or text
            "test_ids": "",
            # names of the columns of a table that are modelled, with commas between them; '': all
            # but the context columns
            "columns": "",
            # names of the columns of a table that densities are conditioned on: numbers and one-hot
            # texts; a single column of text, or one named as NAME:class, gives classes
            "context_columns": "",
            # what the network sees of real values: none (as they are) | coordinate | whiten, by the
            # training split; figures stay in the units of the data
            "standardize": "none",
            # values are known to within cells of this width, as 1 for integers: one number, or one
            # for each column, 0 where it is continuous; noise in the cells is drawn afresh
            "cell_width": (),
        }
    )


def _model() -> ConfigDict:
    return ConfigDict(
        {
            # a name in models.MODELS: mlp | concat_mlp | unet | ddpm | ncsnpp | ncsnv2_64 |
            # ncsnv2_128 | ncsnv2_256
            "name": "ddpm",
            # score | scaled_score | noise | drift | velocity, or a head, which knows the marginal
            # law of the training data: cells | atoms (integers), mixture | whitened (real values)
            "parameterization": "noise",
            # how the network is told the time: time | level | unit_time | sigma | log_snr |
            # reverse_index
            "time_label": "time",
            "ema_rate": 0.9999,  # of the moving average of the parameters, which is evaluated
            "num_scales": 1000,  # noise levels of the discrete chains and of sampling
            # Of the SDE:
            "beta_min": placeholder(float),  # vpsde, subvpsde: β at t = 0
            "beta_max": placeholder(float),  # vpsde, subvpsde: β at t = 1
            "sigma_min": placeholder(float),  # vesde, linearvesde: σ at t = 0
            "sigma_max": placeholder(float),  # vesde, linearvesde: σ at t = 1
            "end": placeholder(float),  # linear: largest time of the path, below 1
            # Of the head:
            "rank": placeholder(int),  # cells, atoms: features per coordinate, from 30 levels on
            # cells, atoms: how much faster the law of a value learns to move, from 30 levels on
            "gain": placeholder(float),
            "components": placeholder(int),  # mixture: Gaussians per coordinate
            "floor": placeholder(float),  # mixture: smallest width, in standard deviations
            "whitening": placeholder(str),  # whitened: full | diagonal covariance
            # Of the network:
            "dropout": placeholder(float),  # rate, in [0, 1), inside each block
            "hidden": placeholder(int),  # mlp, concat_mlp: width
            "depth": placeholder(int),  # mlp: number of residual blocks; concat_mlp: of layers
            "embed_dim": placeholder(int),  # mlp, unet: size of the embedding of the time label
            "activation": placeholder(str),  # mlp, concat_mlp, unet, ncsnv2: swish | gelu | ...
            "nf": placeholder(int),  # ddpm, ncsnpp, ncsnv2: channels of the finest level
            "ch_mult": placeholder(tuple),  # ddpm, ncsnpp: channels of every level over nf
            "num_res_blocks": placeholder(int),  # ddpm, ncsnpp: residual blocks per level
            "attn_resolutions": placeholder(tuple),  # ddpm, ncsnpp: heights that have attention
            # ddpm, ncsnpp: resample by 3×3 convolutions; False: by means and nearest neighbours
            "resamp_with_conv": placeholder(bool),
            "conditional": placeholder(bool),  # ddpm, ncsnpp: False ignores the time label
            "nonlinearity": placeholder(str),  # ddpm, ncsnpp: the activation: swish | elu | ...
            "num_groups": placeholder(int),  # ddpm: groups of the normalisation
            "up_attention": placeholder(str),  # ddpm: after blocks of the way up: every | last
            "downsample_padding": placeholder(str),  # ddpm: of strided convolutions, by name
            "init_mode": placeholder(str),  # ddpm: scale of the first weights: fan_avg | fan_out
            "dropout_mode": placeholder(str),  # ddpm: drops each element | channel
            "fir": placeholder(bool),  # ncsnpp: resample through the filter fir_kernel
            "fir_kernel": placeholder(tuple),  # ncsnpp: taps of the filter
            "skip_rescale": placeholder(bool),  # ncsnpp: residual sums over √2
            "resblock_type": placeholder(str),  # ncsnpp: ddpm | biggan
            "progressive": placeholder(str),  # ncsnpp: output: none | output_skip | residual
            "progressive_input": placeholder(str),  # ncsnpp: none | input_skip | residual
            "progressive_combine": placeholder(str),  # ncsnpp: input_skip joins by: sum | cat
            "embedding_type": placeholder(str),  # ncsnpp: of the time label: positional | fourier
            "fourier_scale": placeholder(float),  # ncsnpp: standard deviation of the frequencies
            "trainable_embedding": placeholder(bool),  # ncsnpp: train the frequencies
            # ncsnpp: of the last convolution of every block and of the output; 0: near zero
            "init_scale": placeholder(float),
            "widths": placeholder(tuple),  # ncsnv2: channels of every stage over nf
            "channels": placeholder(tuple),  # unet: of every level, from the finest
            "blocks": placeholder(tuple),  # unet: number in every level
            "patch": placeholder(int),  # unet: pixels on a side of a position of the finest level
            "attention": placeholder(bool),  # unet: at the coarsest level
            "summary": placeholder(int),  # unet: width of a perceptron of the whole input
            "dtype": placeholder(str),  # float32 | bfloat16, of convolutions and products
            "remat": placeholder(str),  # saves memory by computing again: none | block | keep_convs
        }
    )


def _training() -> ConfigDict:
    return ConfigDict(
        {
            "objective": "dsm",  # dsm | ism (implicit score matching, the ELBO)
            "sde": "vpsde",  # vpsde | subvpsde | vesde | linearvesde | linear
            "continuous": True,  # False: times are model.num_scales levels (DDPM, SMLD; VP, VE)
            "n_iters": 1_300_001,  # steps of the whole training
            "batch_size": 128,  # over all devices and hosts
            "microbatch": 0,  # examples at a time, over all devices and hosts; 0: the whole batch
            "n_jitted_steps": 1,  # steps per dispatch
            "profile_steps": 0,  # steps to trace into <workdir>/profile, after compilation
            "reduce_mean": True,  # mean over dimensions; False: half the sum
            "likelihood_weighting": False,  # weight g²
            "importance_weighting": False,  # with it: times from p(t) ∝ g²/σ²
            "debias": False,  # times from the truncated law of the drift ELBO
            "stratified": False,  # one time per cell of a batch
            # law of the times by name, for likelihood_weighting: uniform | importance | debias |
            # velocity (log σ² uniform) | adaptive (learns where the loss varies); '': as switched
            "time_law": "",
            # probability that an example is seen without its context: then p(x) is learned, too,
            # and evaluated beside p(x | c), with the information log p(x | c) - log p(x)
            "context_dropout": 0.0,
            "score_matching_order": 1,  # 1 | 2 | 3; order k contains order k − 1
            # Of orders 2 and 3:
            "second_order_weight": 1.0,  # of frobenius + trace_weight × trace
            "frobenius_weight": 1.0,  # of its parts; 0 and 1: the quadratic form alone (i-DODE)
            "trace_weight": 1.0,  # of the trace in order 2
            "third_order_weight": 1.0,  # of order 3
            "third_order_form": "gradient",  # gradient | directional (cheaper, forward only)
            "high_order_fraction": 1.0,  # of the batch that has orders 2 and 3: 1, 1/2, 1/3, ...
            "derivative_estimator": "probe",  # probe | exact (small dimensions): ism, orders 2, 3
            "num_probes": 1,  # Rademacher probes per example, where derivatives are by probe
            # Of the Fokker-Planck regulariser, w(t) [alpha (|eps|/sqrt(d))^m + beta (|L|/d)^m]:
            "alpha": 0.0,  # of the vector term; 0: off
            "beta": 0.0,  # of the scalar term; 0: off
            "scalar_fp": "both",  # True (scalar term alone) | False (vector alone) | both
            "fp_wgt_type": "ll",  # w(t): constant 1 | convention g | ll g^2 | dimensionless
            "m": 2.0,  # the power
            "fp_form": "gradient",  # gradient | advective (cheaper, forward only)
            "fp_probes": 1,  # 1 | 2 (unbiased square)
            "fp_fraction": 1.0,  # of the batch: 1, 1/2, 1/3, ...
            "fp_every": 1,  # so many steps, with so many times the weight
            # Of times and steps:
            "smallest_time": 1e-5,  # t_min of training, bound and ODE likelihood
            # t_min with importance_weighting, time_law importance, velocity, adaptive; 0: as above
            "importance_smallest_time": 0.0,
            "log_freq": 100,  # steps between records of the training loss
            "eval_freq": 1000,  # steps between records of the held-out loss
            "snapshot_freq_for_preemption": 5000,  # steps between checkpoints; two are kept
            "snapshot_freq": 50_000,  # steps between checkpoints that are kept for ever
            "snapshot_sampling": True,  # draw samples whenever such a checkpoint is kept
            "init_from": "",  # a run folder or published checkpoint (Flax, .pth) to start from
        }
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "optimizer": "Adam",  # Adam
            "lr": 2e-4,  # learning rate after the warm-up
            "beta1": 0.9,  # Adam: rate of the mean of gradients
            "beta2": 0.999,  # Adam: rate of the mean of their squares
            "eps": 1e-8,  # Adam: added to the root of that
            "weight_decay": 0.0,  # decoupled
            "warmup": 5000,  # steps in which the rate grows from zero
            "grad_clip": 1.0,  # largest global norm of the gradient; negative: off
            "schedule": "constant",  # constant | cosine
        }
    )


def _deq() -> ConfigDict:
    return ConfigDict(
        {
            # Of the Flow++ dequantiser, --mode=train_deq; batch size and optimizer are those above:
            "n_iters": 300_001,  # steps of its training
            "ema_rate": 0.99,  # of the moving average of its parameters
            "num_times": 1,  # times per example of the bound that is minimised
            "filters": 96,  # width of the networks of the couplings
            "components": 32,  # logistics per dimension
            "blocks": 2,  # in each coupling
            "heads": 4,  # of the attention; divides filters and 32
            "couplings": 4,  # an even number
            "processor": "shallow",  # shallow (published for CIFAR-10) | deep (for ImageNet 32)
            "init_from": "",  # a published DeqState to start from
        }
    )


def _classifier() -> ConfigDict:
    return ConfigDict(
        {
            # Of p(c | x_t), --mode=train_classifier; batch size and optimizer are those above:
            "n_iters": 5000,  # steps of its training
            "ema_rate": 0.999,  # of the moving average of its parameters
            "width": 64,  # of every layer, in images of the finest level
            "depth": 3,  # residual blocks; in images a level each, of half the size of the former
            "dropout": 0.1,  # rate within the blocks
        }
    )


def _sampling() -> ConfigDict:
    return ConfigDict(
        {
            "method": "ode",  # ode | pc | sde
            "smallest_time": 1e-3,  # where sampling ends
            "noise_removal": True,  # last step: E[x0 | x_t]
            # for pc: euler_maruyama | reverse_diffusion | ancestral_sampling | none
            "predictor": "euler_maruyama",
            "corrector": "none",  # pc: none | langevin | ald
            "snr": 0.16,  # pc: signal over noise of a step of the corrector
            "n_steps_each": 1,  # pc: steps of the corrector per noise level
            "probability_flow": False,  # pc: the predictor follows the ODE, without noise
            "lmbd": 0.0,  # sde: λ <= 1
            "solver": "tsit5",  # ode: tsit5 | dopri5 | dopri8 | bosh3 | heun
            "rtol": 1e-4,  # ode: relative tolerance of a step
            "atol": 1e-4,  # ode: absolute tolerance of a step
            # --mode=sample:
            "num_samples": 16,  # how many samples in all; with a task, of every measurement
            "context": "",  # a class | test (that of test examples) | an .npy file; '': none
            # which network uses the context: '' the score network, trained with contexts |
            # classifier, that of --mode=train_classifier beside a score network without contexts
            "guide": "",
            # w of s + w (s_c - s), 1: the conditional score; of the classifier s + w ∇ log p(c | x)
            "guidance": 1.0,
            # what y = A x + noise measures: inpaint | colourise | super_resolve | denoise | linear;
            # '': there is no measurement
            "task": "",
            # replacement | dps | moment_matching | twisted (exact for many particles)
            "task_method": "moment_matching",
            "measurements": "",  # an .npy file of y; '': made of the first test examples
            "num_measured": 4,  # how many of the test examples are measured
            "mask": "",  # inpaint: what is missing, top,left,height,width or an .npy of booleans
            "factor": 2,  # super_resolve: pixels on a side of a block
            "matrix": "",  # linear: an .npy file of A, one row per measured number
            # the standard deviation of the noise of y, in units of the model: images have [-1, 1]
            "noise": 0.05,
            "particles": 64,  # twisted: the number of particles of every sample
        }
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        {
            "begin_ckpt": 0,  # first checkpoint to evaluate, times training.snapshot_freq
            "end_ckpt": 0,  # last one, times training.snapshot_freq; 0: the latest only
            "batch_size": 256,  # over all devices and hosts
            "dataset": "test",  # train | validation | test
            "num_examples": 0,  # the first so many of the split; 0: all
            "num_repeats": 1,  # draws of dequantisation, probe and times per example
            "wait_s": 0.0,  # seconds to wait for a checkpoint that training has yet to write
            "dequantization": "uniform",  # uniform | variational | tn, or several: uniform,tn
            "dequantizer": False,  # published name of dequantization=variational
            "tn_tau": 3.0,  # tn: half a cell in standard deviations of the noise at the start
            "enable_bpd": True,  # log-likelihood by the probability-flow ODE
            # where the ODE starts: data, taken for x at t_min, as published | noised (a bound) |
            # auto: noised where the head has a decoder of its own
            "ode_start": "auto",
            "num_importance": 1,  # ODE: draws of the noise that are averaged in p, not in log p
            "bound": True,  # variational bound
            "dsm": True,  # of the bound: denoising form; False: with divergence
            "offset": True,  # of the bound: with the way from x at t_min to x
            "elbo": False,  # ELBO of the plug-in reverse SDE on [0, T] (drift networks)
            "elbo_estimator": "low_variance",  # low_variance | published
            "baselines": True,  # beside likelihoods: uniform, histogram, Gaussians of training data
            # class of every example by Bayes' rule, from p(x | c) of all classes, by the ODE where
            # it is enabled, otherwise by the bound
            "classify": False,
            # of real values: the place of every example among samples of the model
            "calibrate": False,
            "calibration_samples": 100,  # for every example
            "enable_loss": False,  # training objective
            "enable_sampling": True,  # draw samples, and score them if features are given
            "num_samples": 100,  # how many, in all
            "features": "",  # for FID, KID, IS: inception | classifier | a SavedModel folder
            "stats": "",  # file of reference statistics; '': that of data and features
            "solver": "dopri5",  # tsit5 | dopri5 | dopri8 | bosh3 | heun
            "rtol": 3e-5,  # relative tolerance of a step of the ODE
            "atol": 3e-5,  # absolute tolerance of a step of the ODE
            "num_steps": 0,  # equal steps, the same for all examples; 0: by the tolerances
            "estimate_error": True,  # of equal steps, for half as many evaluations again
            "divergence": "rademacher",  # rademacher | gaussian | exact
            "num_probes": 1,  # probes per example of the divergence
            "num_times": 64,  # times per example of bound and ELBO
            "trajectory_lmbds": (0.0, 0.5, 1.0, -1.0),  # λ of the figure of toy trajectories
            "curve_times": 32,  # --mode=diagnose: times of a curve
            "curve_examples": 256,  # --mode=diagnose: examples at each time
        }
    )
