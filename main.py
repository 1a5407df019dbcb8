"""Train and evaluate diffusion models by maximum likelihood.

  python main.py --config=configs/digits/vp.py --workdir=runs/digits --mode=train
  python main.py --config=configs/digits/vp.py --workdir=runs/digits --mode=eval
  python main.py --config=configs/toy/mog1d_ve_order3.py --workdir=runs/m --mode=train,eval,diagnose

Every field of the config can be changed on the command line, e.g. --config.training.batch_size=64
--config.training.likelihood_weighting=True --config.eval.num_repeats=5; configs/base.py lists all
fields. A run continues where it was when it is started again with the same --workdir.

Exit codes: 0 done; 2 a mistake in command, config or data, or no room for it; 3 another process of
the run is gone (134 where JAX ends this one); 75 stopped by SIGTERM or SIGINT, to be started again.
"""

import logging
import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from checkpoints import LostProcessError
from run_lib import distributed, folder, identities, interruption, memory, modes, parallel
from run_lib.experiment import Experiment
from run_lib.settings import choose

FLAGS = flags.FLAGS
logger = logging.getLogger("fokker")
config_flags.DEFINE_config_file("config", None, "Experiment: a file under configs/.")
flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.")
flags.DEFINE_string(
    "mode",
    None,
    "train | train_deq | eval | diagnose | import | fid_stats, or several: train,eval.",
)
flags.DEFINE_string("eval_folder", "eval", "Folder of the results, in --workdir.")
flags.DEFINE_string("deq_folder", "flowpp_dequantizer", "Dequantiser's folder, in --workdir.")
flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, for several processes without Slurm, MPI or TPU."
)
flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are.")
flags.DEFINE_integer("process_id", None, "With --coordinator: which this one is, from 0.")
flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Compiled programs, used again by later starts; default .compilation_cache beside --workdir, "
    "'' for none.",
)
flags.mark_flags_as_required(["config", "workdir", "mode"])

EXIT_USER_ERROR = 2
EXIT_PEER_GONE = 3
EXIT_BUG = 1


def _modes() -> list[str]:
    """The modes to run, in turn."""
    names = FLAGS.mode.split(",")
    for name in names:
        choose(modes.MODES, name, "--mode")
    return names


def _keep_compiled(workdir: Path) -> None:
    """Where compiled programs are kept between starts."""
    chosen = FLAGS.compilation_cache_dir
    if chosen is None and not jax.config.jax_compilation_cache_dir:
        chosen = str(workdir.absolute().parent / ".compilation_cache")
    if chosen is not None:
        jax.config.update("jax_compilation_cache_dir", chosen or None)


def _log_start(workdir: Path, names: list[str]) -> None:
    """The first process tells everything, the others what they are and what goes wrong."""
    if parallel.is_first():
        folder.log_to(workdir)
    logger.info("mode %s, workdir %s, %s", ",".join(names), workdir, distributed.describe())
    if not parallel.is_first():
        logger.setLevel(logging.WARNING)
    overrides = config_flags.get_override_values(FLAGS["config"])
    for name, value in sorted(overrides.items()):
        logger.info("config.%s = %r (command line)", name, value)


def _run() -> None:
    names, workdir = _modes(), Path(FLAGS.workdir).expanduser()
    distributed.connect(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    interruption.watch()  # again: connecting takes the handlers
    for name in names if jax.process_count() > 1 else ():
        if not modes.MODES[name].processes:
            raise ValueError(
                f"--mode={name} runs in one process: start it once, without --coordinator"
            )
    _keep_compiled(workdir)
    experiment = Experiment.from_config(FLAGS.config)
    if names[0] in ("eval", "diagnose", "train_deq") and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} does not exist: run --mode=train first")
    _log_start(workdir, names)
    command = modes.Command(workdir, FLAGS.eval_folder, FLAGS.deq_folder)
    told = {"mode": FLAGS.mode, "eval_folder": FLAGS.eval_folder, "deq_folder": FLAGS.deq_folder}
    identities.agree(experiment, told)
    modes.check(experiment, command, names)
    for name in names:
        modes.MODES[name].run(experiment, command)
        memory.release()


def main(argv: list[str]) -> None:
    """Run the chosen mode; a mistake of the user ends in one clear message, without a traceback."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected arguments: {argv[1:]}", exitcode=2)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk is told once, not by every line of the log
    # Orbax tells failed writes twice, once from its thread with a traceback.
    threads = logging.getLogger("absl")
    threads.addFilter(lambda record: "_SignalingThread" not in record.getMessage())
    memory.one_arena()
    interruption.watch()
    try:
        _run()
    except (ValueError, FloatingPointError, OSError) as error:
        _fail(str(error), EXIT_USER_ERROR)
    except interruption.Interrupted as stop:
        logger.warning("%s", stop)
        sys.exit(interruption.EXIT_INTERRUPTED)
    except (jax.errors.JaxRuntimeError, LostProcessError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            first_line = str(error).splitlines()[0]
            _fail(f"{first_line}. What saves memory: {memory.LEVERS}", EXIT_USER_ERROR)
        if jax.process_count() == 1:
            raise
        _fail(f"another process of this run is gone, or: {error}", EXIT_PEER_GONE)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        logger.exception("not expected")  # a mistake of the program
        _fail(repr(error), EXIT_BUG)


def _fail(message: str, code: int) -> None:
    """The end. Of several processes without waiting for the others, who hear of it by silence."""
    logger.error("error: %s", message)
    if jax.process_count() > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; a config file or field that does not exist ends in one line."""
    try:
        rest = FLAGS(argv)
        getattr(FLAGS.config, "seed", None)  # a file that failed to load complains on first use
        return rest
    except flags.Error as error:
        message = str(error)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        message = f"--config: {error}".replace("\\n", " ").replace("\n", " ")
    sys.stderr.write(f"error: {message}\nmain.py --help explains the flags\n")
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
