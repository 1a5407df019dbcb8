"""From a config to a run: wiring, loops, logging, devices; no formulas.

settings  sections of the config as frozen dataclasses      build     names and settings to objects
parallel  the one place that maps over devices              folder    what a run folder holds
training  the training loop                                 evaluation_loop  likelihoods and samples
quality_loop  samples, FID, KID, IS, statistics              quality   their rows
diagnosis_loop  error curves over t                          figures   densities, trajectories
report    table, figures and report.html of a run folder
"""

from run_lib.diagnosis_loop import diagnose
from run_lib.evaluation_loop import evaluate
from run_lib.quality_loop import fid_stats
from run_lib.training import import_checkpoint, train

__all__ = ["diagnose", "evaluate", "fid_stats", "import_checkpoint", "train"]
