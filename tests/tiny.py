"""A small run that trains in a second: the digits or 2-D points with a tiny network."""

from ml_collections import ConfigDict

from configs import base


def config(dataset: str = "digits") -> ConfigDict:
    """Tiny network, short run, every feature of the loop due at least once."""
    c = base.get_config()
    c.data.update(dataset=dataset, levels=17, num_test=24)
    c.model.update(name="mlp", hidden=16, depth=1, embed_dim=8, dropout=0.0)
    c.model.update(parameterization="velocity", time_label="log_snr", ema_rate=0.9, num_scales=10)
    c.training.update(n_iters=20, batch_size=16, n_jitted_steps=5, log_freq=5, eval_freq=10)
    c.training.update(snapshot_freq=10, snapshot_freq_for_preemption=10)
    c.training.update(likelihood_weighting=True, importance_weighting=True, snapshot_sampling=False)
    c.optim.update(lr=1e-3, warmup=2)
    c.sampling.update(method="sde")
    c.eval.update(batch_size=12, num_times=2, num_samples=9)
    c.eval.update(solver="tsit5", rtol=1e-2, atol=1e-2, baselines=False)
    return c
