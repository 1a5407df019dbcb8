"""From a config to a run: wiring, loops, logging, devices; no formulas.

settings     a whole config, resolved                config_files  files and fields of configs
experiment   all objects that follow from settings   identities    what a figure belongs to
devices      processes, the one pmap, memory         interruption  signals: save, then end
folder       what a run folder holds                 metrics       what a run tells of itself
modes        modes by name, and what each needs      loading       checkpoints to evaluate
trainer      the loop of any training                training      of the score network
sections     dataclasses of the sections             guide         a classifier that guides samples
dequantizer_training  of the dequantiser             estimators    values of every example
baseline_estimators   of trivial models              evaluation_loop  rows of likelihoods
sampling_loop  samples, in shards                    quality       FID, KID, IS, statistics
diagnosis_loop  error curves over t                  figures       densities, bits of a bound
comparison   models that lose to a baseline          report        the table and report.html
conditional_estimators  p(x), information, classes, places among samples of the model
classification  accuracy of classes                  calibration   levels and ranks
"""

from run_lib.dequantizer_training import import_given, train_dequantizer
from run_lib.diagnosis_loop import diagnose
from run_lib.evaluation_loop import evaluate
from run_lib.quality import fid_stats
from run_lib.training import train

__all__ = ["diagnose", "evaluate", "fid_stats", "import_given", "train", "train_dequantizer"]
