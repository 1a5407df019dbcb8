"""Train and evaluate diffusion models by maximum likelihood.

  python main.py                                           train and evaluate: handwritten digits
  python main.py --config.training.score_matching_order=3  the same with other fields
  python main.py --config=configs/mnist/sharp.py --config.data.path=mine.npz   your own images
  python main.py --workdir=runs/digits_vp --mode=eval,sample  evaluate what is there, and sample it
  python main.py --config=configs/mnist/sharp.py --describe  every field, what it means, what is set

Every field of the config can be changed; None gives it its default. A command that is given again
goes on where it was.

Exit codes: 0 done; 1 a fault of the program; 2 a mistake in command, config or data, or no room for
it; 3 another process of the run is gone (134 where JAX ends this one); 75 stopped by SIGTERM or
SIGINT, to be started again.
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
import textwrap
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags

from checkpoints import LostProcessError
from checks import FieldError, choose, of_type, require
from run_lib import config_files, describe, devices, folder, identities, interruption, modes
from run_lib.choices import Choices, choices
from run_lib.experiment import Experiment
from version import VERSION

FLAGS = flags.FLAGS
logger = logging.getLogger("fokker")
OWN_FLAGS = (
    flags.DEFINE_string(
        "config",
        None,
        "A file under configs/, or the config.json of a run folder. By default that of --workdir "
        "if it has one, else configs/digits/vp.py.",
    ),
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run; made if it does not exist. By default runs/NAME, where NAME tells the "
        "config and the fields that the command line changes.",
    ),
    flags.DEFINE_string(
        "mode",
        None,
        "train | train_deq | train_classifier | eval | sample | diagnose | import | fid_stats, or "
        "several in turn. By default train,eval.",
    ),
    flags.DEFINE_string("eval_folder", "eval", "Folder of the results, in --workdir."),
    flags.DEFINE_string(
        "deq_folder", "flowpp_dequantizer", "Folder of the dequantiser, in --workdir."
    ),
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, for several processes without Slurm, MPI or TPU.",
    ),
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are."),
    flags.DEFINE_integer("process_id", None, "With --coordinator: which this one is, from 0."),
    flags.DEFINE_string(
        "compilation_cache_dir",
        None,
        "Folder of compiled programs, which later starts use again. By default "
        ".compilation_cache beside --workdir; '' for none.",
    ),
    flags.DEFINE_boolean(
        "describe",
        False,
        "Print every field of the config, with its meaning; run nothing.",
    ),
    flags.DEFINE_boolean("version", False, "Print the version; run nothing."),
)

COMMAND = "fokker" if __package__ else "python main.py"  # the package is built by setup.py
EXIT_USER_ERROR = 2
EXIT_PEER_GONE = 3
EXIT_BUG = 1


def _modes(text: str) -> list[str]:
    """The modes to run, in turn."""
    names = text.split(",")
    for name in names:
        choose(modes.MODES, name, "--mode")
    return names


def _keep_compiled(workdir: Path) -> None:
    """Set the folder where JAX keeps compiled programs between starts."""
    chosen = FLAGS.compilation_cache_dir
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is None and not before:
        chosen = str(workdir.absolute().parent / ".compilation_cache")
    if chosen is not None:
        jax.config.update("jax_compilation_cache_dir", chosen or None)


def _log_start(chosen: Choices) -> None:
    """The first process tells everything, the others what they are and what goes wrong."""
    if devices.is_first():
        try:
            folder.log_to(chosen.workdir)
        except OSError as error:
            allowed = f"need a folder that can be made and written to: {error.strerror}"
            raise FieldError("--workdir", str(chosen.workdir), allowed) from None
    logger.info("mode %s, workdir %s, %s", chosen.modes, chosen.workdir, devices.describe())
    if not devices.is_first():
        logger.setLevel(logging.WARNING)
    if chosen.by_default:
        logger.info("by default: %s", chosen.by_default)
    for name, value in sorted(chosen.changed.items()):
        logger.info("config.%s = %r (command line)", name, value)


def _run(fields: list[str]) -> None:
    """Run the modes; `fields` are those of the config that the command line changes, name=value."""
    for name in ("eval_folder", "deq_folder", "coordinator"):
        of_type(f"--{name}", FLAGS[name].value, str)
    chosen = choices(FLAGS.config, FLAGS.workdir, FLAGS.mode, fields)
    if FLAGS.describe:
        sys.stdout.write(describe.table(chosen.config, chosen.source, chosen.changed))
        return
    names, workdir = _modes(chosen.modes), chosen.workdir
    devices.connect(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    interruption.watch()  # again: connecting takes the handlers
    for name in names if jax.process_count() > 1 else ():
        allowed = "another mode: this one runs in one process, without --coordinator"
        require(modes.MODES[name].processes, "--mode", name, allowed)
    _keep_compiled(workdir)
    experiment = Experiment.from_config(chosen.config)
    there = workdir.is_dir() or names[0] not in ("eval", "sample", "diagnose", "train_deq")
    require(there, "--workdir", str(workdir), "a folder that exists: run --mode=train first")
    _log_start(chosen)
    steps, warmup = experiment.settings.training.n_iters, experiment.settings.optim.warmup
    if "train" in names and steps <= warmup:
        text = "training.n_iters=%d ends within optim.warmup=%d: the rate never reaches optim.lr"
        logger.warning(text, steps, warmup)
    command = modes.Command(workdir, FLAGS.eval_folder, FLAGS.deq_folder)
    told = {"mode": chosen.modes, "eval_folder": FLAGS.eval_folder, "deq_folder": FLAGS.deq_folder}
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
    """Parse the flags; returns the program and the changed fields of the config, as name=value.

    What asks for help or the version is answered here, and a command line that cannot be understood
    is refused.
    """
    fields, others = config_files.separate(argv[1:])
    if {"--help", "-help", "-h"} & set(others):
        sys.stdout.write(_help())
        sys.exit(0)
    try:
        rest = FLAGS([argv[0], *others])
    except flags.Error as error:
        _refuse(" ".join(str(error).split()))
    if FLAGS.version:
        sys.stdout.write(f"fokker {VERSION}\n")
        sys.exit(0)
    if len(rest) > 1:
        _refuse(f"unexpected arguments {rest[1:]}")
    return [argv[0], *(f"{name}={text}" for name, text in fields)]


def _help() -> str:
    """The commands that most people want, and the flags of this program."""
    texts = [(flag.name, FLAGS[flag.name].help) for flag in OWN_FLAGS]
    texts += [("config.FIELD", "A field of the config, as --config.training.batch_size=64.")]
    texts += [("helpfull", "The flags of the libraries, too.")]
    indent = " " * 26
    lines = [
        textwrap.fill(text, 100, initial_indent=f"  --{name}".ljust(26), subsequent_indent=indent)
        for name, text in texts
    ]
    return "\n".join([__doc__, *lines, ""]).replace("python main.py", COMMAND)


def _refuse(message: str) -> NoReturn:
    """The end of a command line that cannot be understood."""
    sys.stderr.write(f"error: {message}; {COMMAND} --help explains the flags\n")
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
