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
            # an .npz, .npy, .csv or .parquet file, a folder of images, or a folder of tfds
            "path": "",
            "image_size": 0,  # number of pixels on a side of the images; 0: as the data are
            "num_channels": 1,  # 1 (grey) | 3 (colour)
            "category": "",  # the category of lsun, as church_outdoor
            # c of p(x | c): class (y_train, y_test of an npz; digits, mnist, cifar10, svhn) |
            # values (context_train, context_test of an npz: numbers [n, *c]); '': p(x)
            "context": "",
            "levels": 256,  # number of grey levels
            "centered": True,  # the network sees [−1, 1]; False: [0, 1]
            # the network sees the logit of the grey levels; it takes the place of centered
            "logit": False,
            # training sees (k + u)/levels with u uniform in [0, 1); False: it sees k/(levels − 1)
            "uniform_dequantization": True,
            # training turns the left and the right side of every second image, at random
            "random_flip": False,
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
            # values lie above this end: one number, or one for each column, None where it has no
            # such end; with both ends the network sees a logit of the column, with one a logarithm
            "lower": (),
            # values lie below this end, likewise
            "upper": (),
        }
    )


def _model() -> ConfigDict:
    return ConfigDict(
        {
            # a name in models.MODELS: mlp | concat_mlp | unet | ddpm | ncsnpp | ncsnv2_64 |
            # ncsnv2_128 | ncsnv2_256
            "name": "ddpm",
            # what the output of the network means: score | scaled_score | noise | drift | velocity,
            # or a head, which starts from a simple model of the training data: cells | atoms
            # (integers), mixture | whitened (real values)
            "parameterization": "noise",
            # the number by which the network is told the time: time (999 t) | level (the number of
            # the level) | unit_time (t) | sigma (σ) | log_snr (10 log(σ/α)) | reverse_index (the
            # number of the level, counted from the largest noise)
            "time_label": "time",
            # rate, in [0, 1), of the moving average of the parameters; evaluations use this average
            "ema_rate": 0.9999,
            # number of noise levels of the discrete chains and of the samplers pc, sde and twisted
            "num_scales": 1000,
            # Of the SDE:
            "beta_min": placeholder(float),  # vpsde, subvpsde: β at t = 0
            "beta_max": placeholder(float),  # vpsde, subvpsde: β at t = 1
            "sigma_min": placeholder(float),  # vesde, linearvesde: σ at t = 0
            "sigma_max": placeholder(float),  # vesde, linearvesde: σ at t = 1
            "end": placeholder(float),  # linear: the largest time of the path, below 1
            # Of the head:
            # cells, atoms, from 30 levels on: number of features that the network gives for each
            # coordinate; the probabilities of all levels are computed from them
            "rank": placeholder(int),
            # cells, atoms, from 30 levels on: factor of the number that moves the law of a
            # coordinate along the levels; above 1 this motion is learned faster
            "gain": placeholder(float),
            "components": placeholder(int),  # mixture: number of Gaussians for each coordinate
            # mixture: the smallest width of a Gaussian, in standard deviations of the coordinate;
            # with a context, in those of what the regression on it leaves, or in tenths of the
            # standard deviation of the coordinate where that is more
            "floor": placeholder(float),
            # whitened: the covariance of the training data that is used: full | diagonal; the
            # default is full up to 4000 dimensions
            "whitening": placeholder(str),
            # Of the network:
            # mlp, unet, ddpm, ncsnpp: share of the numbers inside each block that training sets to
            # zero, in [0, 1)
            "dropout": placeholder(float),
            "hidden": placeholder(int),  # mlp, concat_mlp: width of the hidden layers
            # mlp: number of residual blocks; concat_mlp: number of hidden layers
            "depth": placeholder(int),
            "embed_dim": placeholder(int),  # mlp, unet: how many numbers encode the time label
            # mlp, concat_mlp, unet, ncsnv2: activation: elu | gelu | lrelu | relu | swish
            "activation": placeholder(str),
            "nf": placeholder(int),  # ddpm, ncsnpp, ncsnv2: number of channels of the finest level
            # ddpm, ncsnpp: the channels of each level, from the finest, divided by nf
            "ch_mult": placeholder(tuple),
            # ddpm, ncsnpp: number of residual blocks of each level on the way down
            "num_res_blocks": placeholder(int),
            # ddpm, ncsnpp: heights of the feature maps, in pixels, that have attention
            "attn_resolutions": placeholder(tuple),
            # ddpm, ncsnpp: change the resolution by 3×3 convolutions; False: halve it by means of
            # pixels and double it by copies of pixels. In ncsnpp only with resblock_type=ddpm
            "resamp_with_conv": placeholder(bool),
            # ddpm, ncsnpp: the network sees the time label; False: it does not
            "conditional": placeholder(bool),
            # ddpm, ncsnpp: activation: elu | gelu | lrelu | relu | swish
            "nonlinearity": placeholder(str),
            # ddpm: number of groups of channels in a group normalisation; it must divide the
            # channels of every level
            "num_groups": placeholder(int),
            # ddpm: the blocks of the way up that attention follows: every | last (of each level)
            "up_attention": placeholder(str),
            # ddpm: how a convolution that halves the resolution pads the image: same (one pixel at
            # the end) | symmetric (one pixel at both ends)
            "downsample_padding": placeholder(str),
            # ddpm: what the scale of the first weights is computed from: fan_avg (inputs and
            # outputs of a layer) | fan_out (outputs alone)
            "init_mode": placeholder(str),
            # ddpm: what dropout sets to zero: element (single numbers) | channel (whole channels)
            "dropout_mode": placeholder(str),
            # ncsnpp: smooth by the filter fir_kernel wherever the resolution changes
            "fir": placeholder(bool),
            "fir_kernel": placeholder(tuple),  # ncsnpp: the weights of this filter, as (1, 3, 3, 1)
            # ncsnpp: divide the sum of a residual block and its input by √2
            "skip_rescale": placeholder(bool),
            # ncsnpp: kind of the residual blocks: ddpm | biggan (these also change the resolution)
            "resblock_type": placeholder(str),
            # ncsnpp: how the levels of the way up add to the output: none (only the finest does) |
            # output_skip (each adds an image) | residual (each adds features)
            "progressive": placeholder(str),
            # ncsnpp: how coarser levels see the input at their resolution: none (not at all) |
            # input_skip (as an image) | residual (as features)
            "progressive_input": placeholder(str),
            # ncsnpp: how input_skip joins the image to the features: sum | cat (as more channels)
            "progressive_combine": placeholder(str),
            # ncsnpp: how the time label is encoded: positional (by sines of the label) | fourier
            # (by sines of its logarithm, with random frequencies)
            "embedding_type": placeholder(str),
            # ncsnpp: standard deviation of the random frequencies of embedding_type=fourier
            "fourier_scale": placeholder(float),
            "trainable_embedding": placeholder(bool),  # ncsnpp: train these frequencies, too
            # ncsnpp: scale of the first weights of the output and of the last convolution of every
            # block; 0: they start near zero
            "init_scale": placeholder(float),
            "widths": placeholder(tuple),  # ncsnv2: the channels of each stage, divided by nf
            # unet: number of channels of each level, from the finest
            "channels": placeholder(tuple),
            "blocks": placeholder(tuple),  # unet: number of blocks of each level, from the finest
            # unet: side, in pixels, of the square that one position of the finest level holds
            "patch": placeholder(int),
            # unet: attention after every block of the coarsest level
            "attention": placeholder(bool),
            # unet: width of a perceptron that sees the whole input and steers all blocks; 0: none
            "summary": placeholder(int),
            # unet, ddpm, ncsnpp: type of convolutions and products: float32 | bfloat16
            "dtype": placeholder(str),
            # unet, ddpm, ncsnpp: what the backward pass computes again, which saves memory: none |
            # block (every block) | keep_convs (every block but its convolutions)
            "remat": placeholder(str),
        }
    )


def _training() -> ConfigDict:
    return ConfigDict(
        {
            # the loss: dsm (denoising score matching) | ism (implicit score matching; with
            # likelihood weights or debias it is the ELBO of the reverse SDE)
            "objective": "dsm",
            # the diffusion: vpsde | subvpsde | vesde | linearvesde | linear (path of flow matching)
            "sde": "vpsde",
            # times are real numbers; False: they are the model.num_scales levels of a discrete
            # chain, that of DDPM for vpsde and that of SMLD for vesde
            "continuous": True,
            "n_iters": 1_300_001,  # number of steps of the whole training
            "batch_size": 128,  # over all devices and hosts
            # number of examples whose gradient is computed at a time, over all devices and hosts;
            # fewer need less memory; 0: the whole batch
            "microbatch": 0,
            # number of steps that run without returning to Python; log_freq, eval_freq and the
            # snapshot frequencies are multiples of it
            "n_jitted_steps": 1,
            # number of steps to trace into <workdir>/profile, after compilation
            "profile_steps": 0,
            # the loss of an example is the mean over its dimensions; False: half the sum
            "reduce_mean": True,
            # weight the squared error of the score by g², as in the variational bound
            "likelihood_weighting": False,
            # with likelihood_weighting: draw times from p(t) ∝ g²/σ², not uniformly
            "importance_weighting": False,
            # draw times on all of [0, T] from p(t) ∝ g²/σ², held constant below smallest_time; for
            # the ELBO of a network that predicts the drift
            "debias": False,
            # divide the law of the times into batch_size parts of equal probability, and draw one
            # time of a batch from each
            "stratified": False,
            # law of the times by name, with likelihood_weighting: uniform | importance | debias |
            # velocity (log σ² is uniform) | adaptive (more times where the loss varies more). The
            # names importance and debias do the same as the fields importance_weighting and debias;
            # '': those fields decide
            "time_law": "",
            # probability that training hides the context of an example. The network then learns
            # p(x), too, and an evaluation gives p(x) and log p(x | c) - log p(x) beside p(x | c)
            "context_dropout": 0.0,
            # 1 | 2 | 3; order 1 fits the score, order 2 also its first derivative, order 3 also its
            # second derivative
            "score_matching_order": 1,
            # Of orders 2 and 3:
            # weight of order 2: of frobenius_weight × frobenius + trace_weight × trace
            "second_order_weight": 1.0,
            # weight of the Frobenius part of order 2; with 0 only the trace part is left, as in
            # i-DODE
            "frobenius_weight": 1.0,
            "trace_weight": 1.0,  # weight of the trace part of order 2
            "third_order_weight": 1.0,  # weight of order 3
            # the derivative that order 3 fits: gradient | directional (cheaper; the same if the
            # Jacobian of the score is symmetric)
            "third_order_form": "gradient",
            # share of a batch for which orders 2 and 3 are computed: 1, 1/2, 1/3, ...
            "high_order_fraction": 1.0,
            # how ism and orders 2 and 3 get derivatives: probe (by random vectors) | exact (for few
            # dimensions)
            "derivative_estimator": "probe",
            # number of random vectors (Rademacher probes) for each example, where derivatives are
            # by probe
            "num_probes": 1,
            # Of the Fokker-Planck regulariser, w(t) [alpha (|eps|/sqrt(d))^m + beta (|L|/d)^m]:
            "alpha": 0.0,  # weight of the vector term; 0: off
            "beta": 0.0,  # weight of the scalar term; 0: off
            # the terms that take part: True (scalar term alone) | False (vector term alone) | both
            "scalar_fp": "both",
            # the weight w(t): constant (1) | convention (g) | ll (g²) | dimensionless (the residual
            # is measured in its own unit, which keeps the weighted term bounded as t goes to 0)
            "fp_wgt_type": "ll",
            "m": 2.0,  # the power m
            # how the residual is computed: gradient | advective (cheaper, forward derivatives
            # alone)
            "fp_form": "gradient",
            # random vectors for each example: 1 | 2 (the square is then unbiased; needs m=2)
            "fp_probes": 1,
            # share of a batch for which the terms are computed: 1, 1/2, 1/3, ...
            "fp_fraction": 1.0,
            # 1: in each step; n: in every n-th step, where the terms then have n times the weight
            "fp_every": 1,
            # Of times and steps:
            # t_min: the smallest time of training, of the bound and of the likelihood by the ODE
            "smallest_time": 1e-5,
            # takes the place of smallest_time with importance_weighting, or with time_law
            # importance, velocity or adaptive; 0: smallest_time stays
            "importance_smallest_time": 0.0,
            "log_freq": 100,  # steps between records of the training loss
            "eval_freq": 1000,  # steps between records of the held-out loss
            # steps between checkpoints of which only the two latest are kept
            "snapshot_freq_for_preemption": 5000,
            "snapshot_freq": 50_000,  # steps between checkpoints that are kept for ever
            "snapshot_sampling": True,  # draw samples whenever such a checkpoint is kept
            # a run folder or a published checkpoint (Flax, .pth) that the training starts from
            "init_from": "",
        }
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "optimizer": "Adam",  # the name of the optimizer; only Adam is known
            "lr": 2e-4,  # learning rate after the warm-up
            "beta1": 0.9,  # Adam: rate of the moving average of the gradient
            "beta2": 0.999,  # Adam: rate of the moving average of the squared gradient
            "eps": 1e-8,  # Adam: added to the root of the second average
            # a step also subtracts learning rate × weight_decay × parameter from every parameter,
            # except from the prior of a head
            "weight_decay": 0.0,
            "warmup": 5000,  # first steps, in which the learning rate grows from zero
            # largest norm of the whole gradient; a longer one is shortened to it; negative: off
            "grad_clip": 1.0,
            # the learning rate after the warm-up: constant | cosine (it falls to zero in the end)
            "schedule": "constant",
        }
    )


def _deq() -> ConfigDict:
    return ConfigDict(
        {
            # Of the Flow++ dequantiser, --mode=train_deq; batch size and optimizer are those above:
            "n_iters": 300_001,  # number of steps of its training
            "ema_rate": 0.99,  # rate of the moving average of its parameters, which is evaluated
            # number of times for each example at which the bound that is minimised is evaluated
            "num_times": 1,
            "filters": 96,  # number of channels of the networks inside the couplings
            # number of logistic distributions in the mixture that moves a coordinate
            "components": 32,
            "blocks": 2,  # number of blocks in the network of each coupling
            "heads": 4,  # number of attention heads; it must divide filters and 32
            # number of coupling layers; an even number moves both halves of the image equally often
            "couplings": 4,
            # the networks: shallow (published for CIFAR-10) | deep (published for ImageNet 32)
            "processor": "shallow",
            "init_from": "",  # the file of a published dequantiser to start from
        }
    )


def _classifier() -> ConfigDict:
    return ConfigDict(
        {
            # Of p(c | x_t), --mode=train_classifier; batch size and optimizer are those above:
            "n_iters": 5000,  # number of steps of its training
            "ema_rate": 0.999,  # rate of the moving average of its parameters, which guides samples
            # width of every layer; for images the number of channels of the finest level
            "width": 64,
            # number of residual blocks; for images each block has a level of its own, of half the
            # size of the level before
            "depth": 3,
            # share of the numbers inside each block that training sets to zero, in [0, 1)
            "dropout": 0.1,
        }
    )


def _sampling() -> ConfigDict:
    return ConfigDict(
        {
            # what is solved back in time: ode (the probability-flow ODE) | pc (predictor and
            # corrector at every noise level) | sde (one of the reverse SDEs, see lmbd)
            "method": "ode",
            "smallest_time": 1e-3,  # the time at which sampling ends
            # the last step replaces x_t by the mean of x0 given x_t
            "noise_removal": True,
            # for pc: euler_maruyama | reverse_diffusion | ancestral_sampling | none
            "predictor": "euler_maruyama",
            "corrector": "none",  # pc: none | langevin | ald (annealed Langevin dynamics)
            "snr": 0.16,  # pc: ratio of signal to noise of a step of the corrector
            "n_steps_each": 1,  # pc: number of steps of the corrector at every noise level
            "probability_flow": False,  # pc: the predictor follows the ODE and adds no noise
            # sde: λ <= 1 of the reverse SDE; 0: the usual one, 1: the ODE
            "lmbd": 0.0,
            "solver": "tsit5",  # ode: its method: tsit5 | dopri5 | dopri8 | bosh3 | heun
            "rtol": 1e-4,  # ode: relative tolerance of the error of a step
            "atol": 1e-4,  # ode: absolute tolerance of the error of a step
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
            # the first checkpoint to evaluate: its step is this number times training.snapshot_freq
            "begin_ckpt": 0,
            # the last checkpoint to evaluate, counted in the same way; 0: only the latest one
            "end_ckpt": 0,
            "batch_size": 256,  # examples in a batch, over all devices and hosts
            "dataset": "test",  # the split to evaluate: train | validation | test
            "num_examples": 0,  # evaluate the first so many examples of the split; 0: all
            # how often each example is evaluated, each time with fresh noise, probes and times
            "num_repeats": 1,
            "wait_s": 0.0,  # seconds to wait for a checkpoint that training has yet to write
            # law of the noise within the cells of grey levels: uniform | variational | tn
            # (truncated normal), or several, as uniform,tn
            "dequantization": "uniform",
            # True means dequantization=variational; this is the published name
            "dequantizer": False,
            # tn: half the width of a cell, in standard deviations of the noise at the start
            "tn_tau": 3.0,
            "enable_bpd": True,  # compute the likelihood by the probability-flow ODE
            # where the ODE starts: data (taken as x at t_min, as published) | noised (x at t_min is
            # drawn from the data; the value is a bound) | auto (noised if the head has a decoder of
            # its own)
            "ode_start": "auto",
            # ODE: number of draws of the noise over which p is averaged (p itself, not log p)
            "num_importance": 1,
            "bound": True,  # compute the variational bound
            # the bound is computed by denoising score matching; False: by the divergence
            "dsm": True,
            # the bound is one for the data x; False: for x at t_min, without the way back to x
            "offset": True,
            # compute the ELBO of the reverse SDE on [0, T], for networks that predict drift or
            # score
            "elbo": False,
            # how the ELBO is estimated: low_variance | published (as in the code of the paper)
            "elbo_estimator": "low_variance",
            # also evaluate trivial models: uniform, histogram, Gaussians of the training data
            "baselines": True,
            # find the class of every example by Bayes' rule from p(x | c) of all classes: by the
            # ODE if enable_bpd is on, otherwise by the bound
            "classify": False,
            # for real values: test the calibration by comparing each example with samples
            "calibrate": False,
            "calibration_samples": 100,  # number of these samples for each example
            "enable_loss": False,  # evaluate the training objective, too
            # draw samples, and compute FID, KID and IS of them if features is set
            "enable_sampling": True,
            "num_samples": 100,  # number of samples in all
            # the network that gives the features for FID, KID and IS: inception | classifier | a
            # SavedModel folder; '': none
            "features": "",
            # file of the reference features; '': the usual file of these data and features
            "stats": "",
            "solver": "dopri5",  # solver of the ODE: tsit5 | dopri5 | dopri8 | bosh3 | heun
            "rtol": 3e-5,  # relative tolerance of a step of the ODE
            "atol": 3e-5,  # absolute tolerance of a step of the ODE
            # number of equal steps of the ODE, the same for all examples; 0: the tolerances decide
            "num_steps": 0,
            # with equal steps: estimate the error of the solver, for half as many evaluations again
            "estimate_error": True,
            # how the divergence of the score is computed: rademacher | gaussian (estimated by
            # random vectors of this law) | exact
            "divergence": "rademacher",
            "num_probes": 1,  # number of these random vectors for each example
            "num_times": 64,  # number of times for each example of the bound and the ELBO
            # λ of the reverse SDEs whose paths are drawn in 1 or 2 dimensions; 1 is the ODE
            "trajectory_lmbds": (0.0, 0.5, 1.0, -1.0),
            "curve_times": 32,  # --mode=diagnose: number of times of a curve
            "curve_examples": 256,  # --mode=diagnose: number of examples at each time
        }
    )
