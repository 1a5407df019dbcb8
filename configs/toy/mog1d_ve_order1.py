"""Train an MLP on three Gaussians under the VE SDE by score matching of order 1.

The set is on the line. It is a toy of Lu et al. 2022, https://arxiv.org/abs/2206.08265.

Command: python main.py --config=configs/toy/mog1d_ve_order1.py \
             --workdir=runs/mog1d_1 --mode=train,eval,diagnose
Expected: after 5,000 steps (--config.training.n_iters=5000 .snapshot_freq=5000), mean ± s.e. of
5 seeds, two CPU cores: KL(data ‖ ODE) 0.0115 ± 0.0020 nats, ODE −0.1176 ± 0.0020 nats.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A small residual MLP on fresh samples."""
    config = base.get_config()
    config.data.update(dataset="mog1d", num_test=4000)
    config.model.update(name="mlp", parameterization="noise", time_label="log_snr")
    config.model.update(hidden=64, depth=2, ema_rate=0.999)
    config.training.update(sde="vesde", n_iters=10_000, batch_size=256, n_jitted_steps=50)
    config.training.update(likelihood_weighting=True, importance_weighting=True, stratified=True)
    config.training.update(derivative_estimator="exact", log_freq=500, eval_freq=2000)
    config.training.update(snapshot_freq=10_000, snapshot_freq_for_preemption=5000)
    config.optim.update(lr=1e-3, warmup=200, schedule="cosine")
    config.sampling.update(method="sde", smallest_time=1e-5)
    config.eval.update(batch_size=2000, divergence="exact", num_samples=20_000, bound=False)
    config.eval.update(trajectory_lmbds=(0.0, 1.0))
    return config
