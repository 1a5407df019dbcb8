"""Train an MLP on three Gaussians under the VE SDE with the Fokker–Planck regulariser.

The objective is score matching of order 1 with this regulariser. The set is on the line.

Command: python main.py --config=configs/toy/mog1d_ve_fp.py \
             --workdir=runs/mog1d_fp --mode=train,eval,diagnose
Expected: not reproduced here.
"""

from ml_collections import ConfigDict

from configs.toy import mog1d_ve_order1


def get_config() -> ConfigDict:
    """The residual by its cheaper form; on a line one probe is exact and the curl is zero."""
    config = mog1d_ve_order1.get_config()
    config.training.update(alpha=0.1, fp_wgt_type="dimensionless")
    config.training.update(fp_form="advective")
    return config
