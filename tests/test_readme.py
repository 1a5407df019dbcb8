"""What the README promises."""

import re
from pathlib import Path

import jax.numpy as jnp

from configs import base

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_and_learns_the_density() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names: dict = {}
    exec(code, names)
    truth = names["data"].log_prob(names["x"], jnp.full(256, 1e-5), names["sde"])
    gap = truth - names["ode"].log_p  # its mean is the KL divergence to the model
    standard_error = gap.std() / 16
    assert -4 * standard_error < gap.mean() < 0.1


def test_the_code_map_names_files_that_exist_and_all_modules() -> None:
    table = README.split("## Code map")[1].split("## Notation")[0]
    named = {n for row in table.splitlines()[4:] for n in re.findall(r"`([\w/]+(?:\.py)?/?)`", row)}
    modules = {p.name for p in ROOT.glob("*.py")} - {"setup.py"}
    assert modules <= named
    for name in named:
        if name.endswith((".py", "/")):
            assert (ROOT / name).exists(), name


def test_no_figure_is_missing() -> None:
    assert "@" not in README


def test_every_config_field_in_the_readme_exists() -> None:
    config = base.get_config()
    for section, field in re.findall(r"`?--config\.(\w+)\.(\w+)=", README):
        assert field in config[section], f"{section}.{field}"
    for section, field in re.findall(
        r"`(data|model|training|optim|deq|sampling|eval)\.(?!py`)(\w+)", README
    ):
        assert field in config[section], f"{section}.{field}"
