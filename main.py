"""Train and evaluate diffusion models by maximum likelihood.

  python main.py --config=configs/digits/vp.py --workdir=runs/digits --mode=train
  python main.py --config=configs/digits/vp.py --workdir=runs/digits --mode=eval
  python main.py --workdir=runs/digits --mode=sample --config.sampling.task=inpaint
  python main.py --config=configs/toy/mog1d_ve_order3.py --workdir=runs/m --mode=train,eval,diagnose

Every field of the config can be changed on the command line, e.g. --config.training.batch_size=64
--config.training.likelihood_weighting=True --config.eval.num_repeats=5; configs/base.py lists all
fields, and None gives a field its default. The config.json of a run folder is a config, too, and
that of --workdir is the default for all modes but train.
A run continues where it was when it is started again with the same --workdir.

Exit codes: 0 done; 2 a mistake in command, config or data, or no room for it; 3 another process of
the run is gone (134 where JAX ends this one); 75 stopped by SIGTERM or SIGINT, to be started again.
"""

# ruff: noqa: E402  (signals are heard before the imports, which take seconds)

import os
import signal
import sys


def _end(number: int, frame: object) -> None:
    """The end of a process that has done nothing yet."""
    del frame
    os.write(2, f"{signal.Signals(number).name}: stopped before the start\n".encode())
    os._exit(75)


if __name__ == "__main__":
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, _end)

import logging
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags

from checkpoints import LostProcessError
from checks import FieldError, choose, of_type, path_of, require
from run_lib import config_files, devices, folder, identities, interruption, modes
from run_lib.experiment import Experiment

FLAGS = flags.FLAGS
logger = logging.getLogger("fokker")
flags.DEFINE_string(
    "config",
    None,
    "A file under configs/, or the config.json of a run folder; default for all modes but train is "
    "that of --workdir.",
)
flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.")
flags.DEFINE_string(
    "mode",
    None,
    "train | train_deq | eval | sample | diagnose | import | fid_stats, or several: train,eval.",
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
flags.mark_flags_as_required(["workdir", "mode"])

EXIT_USER_ERROR = 2
EXIT_PEER_GONE = 3
EXIT_BUG = 1


def _modes() -> list[str]:
    """The modes to run, in turn."""
    names = FLAGS.mode.split(",")
    for name in names:
        choose(modes.MODES, name, "--mode")
    return names


def _config_of(workdir: Path, names: list[str]) -> str:
    """The config of a run folder, where --config is left out."""
    path = workdir / "config.json"
    allowed = "a file under configs/: a training says what it is of"
    require("train" not in names, "--config", None, allowed)
    allowed = f"a file under configs/, as there is no {path}: run --mode=train first"
    require(path.is_file(), "--config", None, allowed)
    return str(path)


def _keep_compiled(workdir: Path) -> None:
    """Where compiled programs are kept between starts."""
    chosen = FLAGS.compilation_cache_dir
    if chosen is None and not jax.config.jax_compilation_cache_dir:
        chosen = str(workdir.absolute().parent / ".compilation_cache")
    if chosen is not None:
        jax.config.update("jax_compilation_cache_dir", chosen or None)


def _log_start(workdir: Path, names: list[str], changed: dict[str, object]) -> None:
    """The first process tells everything, the others what they are and what goes wrong."""
    if devices.is_first():
        try:
            folder.log_to(workdir)
        except OSError as error:
            allowed = f"need a folder that can be made and written to: {error.strerror}"
            raise FieldError("--workdir", str(workdir), allowed) from None
    logger.info("mode %s, workdir %s, %s", ",".join(names), workdir, devices.describe())
    if not devices.is_first():
        logger.setLevel(logging.WARNING)
    for name, value in sorted(changed.items()):
        logger.info("config.%s = %r (command line)", name, value)


def _run(fields: list[str]) -> None:
    """Run the modes; `fields` are those of the config that the command line changes, name=value."""
    for name in ("eval_folder", "deq_folder", "coordinator"):
        of_type(f"--{name}", FLAGS[name].value, str)
    names, workdir = _modes(), path_of("--workdir", FLAGS.workdir)
    config = config_files.load(FLAGS.config or _config_of(workdir, names))
    pairs = [field.partition("=") for field in fields]
    changed = {name: config_files.change(config, name, text) for name, _, text in pairs}
    devices.connect(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    interruption.watch()  # again: connecting takes the handlers
    for name in names if jax.process_count() > 1 else ():
        allowed = "another mode: this one runs in one process, without --coordinator"
        require(modes.MODES[name].processes, "--mode", name, allowed)
    _keep_compiled(workdir)
    experiment = Experiment.from_config(config)
    there = workdir.is_dir() or names[0] not in ("eval", "sample", "diagnose", "train_deq")
    require(there, "--workdir", str(workdir), "a folder that exists: run --mode=train first")
    _log_start(workdir, names, changed)
    steps, warmup = experiment.settings.training.n_iters, experiment.settings.optim.warmup
    if "train" in names and steps <= warmup:
        text = "training.n_iters=%d ends within optim.warmup=%d: the rate never reaches optim.lr"
        logger.warning(text, steps, warmup)
    command = modes.Command(workdir, FLAGS.eval_folder, FLAGS.deq_folder)
    told = {"mode": FLAGS.mode, "eval_folder": FLAGS.eval_folder, "deq_folder": FLAGS.deq_folder}
    identities.agree(experiment, told)
    modes.check(experiment, command, names)
    for name in names:
        modes.MODES[name].run(experiment, command)
        devices.release()


def main(argv: list[str]) -> None:
    """Run the chosen modes; a mistake of the user ends in one clear line, without a traceback.

    `argv` is what `parse` returns.
    """
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk is told once, not by every line of the log
    # Orbax tells failed writes twice, once from its thread with a traceback.
    threads = logging.getLogger("absl")
    threads.addFilter(lambda record: "_SignalingThread" not in record.getMessage())
    devices.one_arena()
    interruption.watch()
    try:
        _run(argv[1:])
    except OSError as error:
        known = error.filename is not None and error.strerror
        _fail(f"{error.filename}: {error.strerror}" if known else str(error), EXIT_USER_ERROR)
    except (ValueError, FloatingPointError) as error:
        _fail(str(error), EXIT_USER_ERROR)
    except interruption.Interrupted as stop:
        logger.warning("%s", stop)
        sys.exit(interruption.EXIT_INTERRUPTED)
    except (jax.errors.JaxRuntimeError, LostProcessError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            first_line = str(error).splitlines()[0]
            _fail(f"{first_line}. What saves memory: {devices.LEVERS}", EXIT_USER_ERROR)
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
    """Parse the flags; returns the program and the changed fields of the config, as name=value."""
    fields, others = config_files.separate(argv[1:])
    try:
        rest = FLAGS([argv[0], *others])
    except flags.Error as error:
        _refuse(" ".join(str(error).split()))
    if len(rest) > 1:
        _refuse(f"unexpected arguments {rest[1:]}")
    return [argv[0], *(f"{name}={text}" for name, text in fields)]


def _refuse(message: str) -> NoReturn:
    """The end of a command line that cannot be understood."""
    sys.stderr.write(f"error: {message}; main.py --help explains the flags\n")
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
