"""Train an MLP that predicts the velocity on the Swiss roll under the VP SDE.

The loss is likelihood-weighted, and the ODE likelihood has the exact trace.

Command: python main.py --config=configs/toy/swissroll_vp.py --workdir=runs/swissroll --mode=train
         python main.py --config=configs/toy/swissroll_vp.py --workdir=runs/swissroll --mode=eval
Expected: not reproduced here; no model can be below the entropy of the data, 1.967 ± 0.002 nats.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A small residual MLP on fresh samples, about a minute on two CPU cores."""
    config = base.get_config()
    config.data.update(dataset="swissroll", num_test=2000)
    config.model.update(name="mlp", parameterization="velocity", time_label="log_snr")
    config.model.update(hidden=128, depth=3, ema_rate=0.999)
    config.training.update(n_iters=10_000, batch_size=256, n_jitted_steps=50)
    config.training.update(likelihood_weighting=True, importance_weighting=True, stratified=True)
    config.training.update(log_freq=500, eval_freq=2000)
    config.training.update(snapshot_freq=10_000, snapshot_freq_for_preemption=5000)
    config.optim.update(lr=1e-3, warmup=200, schedule="cosine")
    config.eval.update(batch_size=2000, divergence="exact", num_samples=20_000)
    return config
