"""Train an MLP on the checkerboard under the VE SDE with the Fokker–Planck regulariser.

The objective is score matching of order 1 with this regulariser. The set is in the plane.

Command: python main.py --config=configs/toy/checkerboard_ve_fp.py \
             --workdir=runs/checkerboard_fp --mode=train,eval,diagnose
Expected: after 4,000 steps (--config.training.n_iters=4000 .snapshot_freq=4000), mean ± s.e. of
5 seeds, two CPU cores: KL(data ‖ ODE) 0.4021 ± 0.0084 nats, ODE 3.8678 ± 0.0084 nats.
Means over t: r_FP 4.77 ± 0.25 (without the term 8.43 ± 0.45), asymmetry 0.043 ± 0.007 (0.060 ±
0.005); the likelihood does not change (KL +0.006 ± 0.012).
"""

from ml_collections import ConfigDict

from configs.toy import checkerboard_ve_order1


def get_config() -> ConfigDict:
    """The residual by its cheaper form, squared without bias by two probes."""
    config = checkerboard_ve_order1.get_config()
    config.training.update(alpha=0.1, fp_wgt_type="dimensionless")
    config.training.update(fp_form="advective", fp_probes=2)
    return config
