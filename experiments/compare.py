"""Train, evaluate and diagnose several configs over several seeds; one table and one figure.

    python -m experiments.compare CONFIG... --workdir=runs/mog1d [--seeds=5]
        [--modes=train,eval,diagnose] [--set training.n_iters=5000 ...]
        [--vary model.parameterization=velocity,cells ...]

`--vary` makes one variant of every config for each value of a field; several fields give all
combinations. A run is a folder WORKDIR/<config or variant>/seed_<k> like any other; a run that is
complete is not repeated, an interrupted one continues. Every figure is mean ± standard error over
seeds, at the same test points (whose own error is in each run's table); differences from the first
config are paired by seed. WORKDIR gets compare.txt, compare.jsonl and compare.png.
"""

import argparse
import itertools
import json
import logging
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

import plotting
import run_lib
from checks import one_of, require
from run_lib import comparison, config_files, folder, identities, report
from run_lib.experiment import Experiment
from run_lib.settings import Settings

logger = logging.getLogger("fokker")
# A folder keeps what it was trained with; with more steps it goes on.
LONGER = tuple(
    f"training.{name}"
    for name in (
        "n_iters",
        "log_freq",
        "eval_freq",
        "snapshot_freq",
        "snapshot_freq_for_preemption",
    )
)
AVERAGED_CURVES = ("dsm", "r_fp", "asymmetry")


class Value(NamedTuple):
    """Mean over seeds, its standard error, and the number of seeds."""

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


Results = dict[str, dict[int, float]]  # quantity → seed → value


def load(path: str, settings: list[str]) -> ConfigDict:
    """The config of a file, with `section.field=value` applied.

    Raises:
        ValueError: the file is missing, or a field does not exist.
    """
    config = config_files.load(path)
    for setting in settings:
        name, equals, text = setting.partition("=")
        require(bool(equals), "--set", setting, "section.field=value")
        require(name != "seed", "--set", setting, "--seeds and --first_seed for the seeds")
        config_files.change(config, name, text)
    return config


def variants(configs: list[str], varied: list[str], common: list[str]) -> dict[str, ConfigDict]:
    """Every config with every combination of the varied fields, by the name of its folder.

    Raises:
        ValueError: a config or a field is wrong, or two variants have one name.
    """
    values = [
        [f"{field}={value}" for value in text.split(",")] for field, text in map(_split, varied)
    ]
    found: dict[str, ConfigDict] = {}
    for path, chosen in itertools.product(configs, itertools.product(*values)):
        stems = [Path(path).stem] if len(configs) > 1 or not chosen else []
        name = "_".join([*stems, *(setting.split(".", 1)[-1] for setting in chosen)])
        require(name not in found, "configs and --vary", name, "variants of different names")
        found[name] = load(path, [*common, *chosen])
        Settings.from_config(found[name])
    return found


def _split(setting: str) -> tuple[str, str]:
    field, equals, values = setting.partition("=")
    require(bool(equals and values), "--vary", setting, "section.field=value,value")
    return field, values


def run(config: ConfigDict, seed: int, workdir: Path, modes: list[str]) -> dict[str, float]:
    """Train, evaluate and diagnose one config with one seed; what its folder then says."""
    config.seed = seed
    experiment = Experiment.from_config(config)
    settings = experiment.settings
    others = folder.trained_otherwise(workdir, settings.resolved(), LONGER)
    require(not others, "--workdir", "; ".join(others), "another folder for other settings")
    folder.log_to(workdir)
    rows = workdir / "eval" / f"diagnosis_{settings.training.n_iters}.jsonl"
    if "train" in modes:
        run_lib.train(experiment, workdir)
    if "eval" in modes:
        run_lib.evaluate(experiment, workdir, "eval")
    if "diagnose" in modes and not _is_diagnosed(rows):
        run_lib.diagnose(experiment, workdir, "eval")
    jax.clear_caches()
    return evaluated(settings, workdir) | (diagnosed(rows) if "diagnose" in modes else {})


def _is_diagnosed(path: Path) -> bool:
    """Say whether the file holds a diagnosis of the checkpoint that is there now."""
    if not path.exists():
        return False
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    named = [row for row in rows if "identity" in row]
    return bool(named) and identities.reported(path.parent, named) == rows


def evaluated(settings: Settings, workdir: Path) -> dict[str, float]:
    """Means of the last step by estimator; of the ODE the network's evaluations and seconds, too.

    Raises:
        ValueError: an estimator has rows of several protocols.
    """
    found: dict[str, float] = {}
    for result in report.summaries(workdir / "eval"):
        if (result.step, result.split) != (settings.training.n_iters, settings.eval.dataset):
            continue
        if result.estimator in found:
            raise ValueError(
                f"{workdir / 'eval'} has {result.estimator} by several protocols: remove it or use "
                "another --workdir"
            )
        found[result.estimator] = result.value.mean
        if result.estimator == "ODE":
            found |= {"ODE evaluations": result.nfe, "ODE seconds per example": result.seconds}
    return found


def diagnosed(path: Path) -> dict[str, float]:
    """Totals, and time averages of some curves, from the rows of a diagnosis."""
    if not path.exists():
        raise ValueError(f"{path} is missing: the run has not reached training.n_iters")
    found: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "total" in row:
            found[row["total"]] = row["mean"]
        elif row["curve"] in AVERAGED_CURVES:
            curves.setdefault(row["curve"], []).append((row["weight"], row["mean"]))
    for name, points in curves.items():
        found[f"mean over t of {name}"] = time_average(points)
    return found


def time_average(points: list[tuple[float, float]]) -> float:
    """∫ curve dt/∫ dt from pairs of a weight of ∫ dt and a value."""
    return sum(w * value for w, value in points) / sum(w for w, _ in points)


def over_seeds(values: list[float]) -> Value:
    """Mean and standard error; the latter is NaN for one seed."""
    number = len(values)
    error = statistics.stdev(values) / math.sqrt(number) if number > 1 else math.nan
    return Value(statistics.fmean(values), error, number)


def table(results: dict[str, Results]) -> str:
    """One line per quantity and config, with the paired difference from the first config."""
    first = next(iter(results))
    lines = [["quantity", "config", "mean ± s.e.", "seeds", f"difference from {first}"]]
    for quantity in _quantities(results):
        for name, found in results.items():
            values, reference = found.get(quantity, {}), results[first].get(quantity, {})
            if not values:
                continue
            gaps = [values[seed] - reference[seed] for seed in values if seed in reference]
            gap = "" if name == first or not gaps else str(over_seeds(gaps))
            value = over_seeds(list(values.values()))
            lines.append([quantity, name, str(value), str(value.seeds), gap])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def _quantities(results: dict[str, Results]) -> list[str]:
    return list(dict.fromkeys(quantity for found in results.values() for quantity in found))


def write(results: dict[str, Results], workdir: Path) -> str:
    """compare.txt, compare.jsonl and compare.png; the text of the first."""
    text = table(results)
    (workdir / "compare.txt").write_text(text + "\n", encoding="utf-8")
    rows = [
        {"config": name, "quantity": quantity, "seed": seed, "value": value}
        for name, found in results.items()
        for quantity, by_seed in found.items()
        for seed, value in by_seed.items()
    ]
    (workdir / "compare.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    panels = {
        quantity: {name: list(r[quantity].values()) for name, r in results.items() if quantity in r}
        for quantity in _quantities(results)
        if quantity not in comparison.BASELINES  # one value, whatever the config and the seed
    }
    plotting.save_comparison(workdir / "compare.png", panels)
    return text


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="config files; the first is compared with")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1..N")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--modes", default="train,eval,diagnose", help="what to run or to read")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="SECTION.FIELD=VALUE,VALUE,..."
    )
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    results: dict[str, Results] = {}
    try:
        for mode in options.modes.split(","):
            one_of("--modes", mode, ("train", "eval", "diagnose"))
        require(options.seeds >= 1, "--seeds", options.seeds, "at least 1")
        configs = variants(options.configs, options.vary, options.set)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name, config in configs.items():
                workdir = options.workdir / name / f"seed_{seed}"
                found = run(config, seed, workdir, options.modes.split(","))
                for quantity, value in found.items():
                    results.setdefault(name, {}).setdefault(quantity, {})[seed] = value
                if results:
                    write(results, options.workdir)
    except (ValueError, FloatingPointError) as error:
        logger.error("error: %s", error)
        sys.exit(2)
    if results:
        text = write(results, options.workdir)
        logger.info("\n%s\nopen %s", text, options.workdir / "compare.png")
    else:
        logger.info("trained; --modes=%s evaluates nothing to compare", options.modes)


if __name__ == "__main__":
    main()
