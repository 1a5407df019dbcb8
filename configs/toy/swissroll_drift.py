"""Train a drift network on the Swiss roll under the VP SDE by denoising score matching.

The set-up is that of Huang et al. 2021, https://arxiv.org/abs/2106.02808.

Command: python main.py --config=configs/toy/swissroll_drift.py \
             --workdir=runs/swissroll_drift --mode=train,eval
Expected: −ELBO 2.0432 ± 0.0023, ODE 2.0376 ± 0.0021 nats (mean ± s.e. of 5 seeds, 10,000 points,
two CPU cores). Published code, same network and steps, without moving average: −ELBO 2.105 ± 0.005
(one seed). No model can be below the entropy of the data, 1.967 ± 0.002.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The published perceptron of 33,794 parameters, Adam without schedule, 20,000 steps."""
    config = base.get_config()
    config.data.update(dataset="swissroll", num_test=10_000)
    config.model.update(name="concat_mlp", parameterization="drift", time_label="unit_time")
    config.model.ema_rate = 0.999
    config.training.update(n_iters=20_000, batch_size=256, n_jitted_steps=100, reduce_mean=False)
    config.training.update(log_freq=1000, eval_freq=5000, smallest_time=1e-5)
    config.training.update(snapshot_freq=20_000, snapshot_freq_for_preemption=10_000)
    config.optim.update(lr=1e-3, warmup=0, grad_clip=-1.0)
    config.sampling.update(method="sde", smallest_time=1e-5)
    config.eval.update(batch_size=2000, divergence="exact", num_samples=20_000)
    config.eval.update(elbo=True, bound=False, num_times=64)
    return config
