"""From a config to a run: wiring, loops, logging, devices; no formulas.

settings  sections of the config as frozen dataclasses      experiment  all objects that follow
parallel  the one place that maps over devices              folder    what a run folder holds
distributed  how processes find each other                  interruption  signals: save, then end
memory    what a compiled step needs, and what would fit    profiling  traces
trainer   the loop of any training                          training  of the score network
loading   which checkpoints, their parameters               dequantizer_training  of the dequantiser
estimators  what is estimated of every example              evaluation_loop  rows of likelihoods
quality_loop  samples, FID, KID, IS, statistics              quality   their rows
diagnosis_loop  error curves over t                          figures   densities, trajectories
report    table, figures and report.html of a run folder
"""

from run_lib.dequantizer_training import import_given, train_dequantizer
from run_lib.diagnosis_loop import diagnose
from run_lib.evaluation_loop import evaluate
from run_lib.quality_loop import fid_stats
from run_lib.training import train

__all__ = ["diagnose", "evaluate", "fid_stats", "import_given", "train", "train_dequantizer"]
