"""What README and docs promise: examples run, fields and files exist."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from configs import base
from run_lib import config_files
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LIBRARY = (ROOT / "docs" / "guides" / "library.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = '"training.n_jitted_steps": 100, "model.hidden": 64'
SECTIONS = "data|model|training|optim|deq|sampling|eval"


def examples(page: str) -> list[dict]:
    """The names that each example in Python leaves behind."""
    found = []
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        names: dict = {}
        exec(code, names)
        found.append(names)
    return found


def test_the_library_examples_learn_a_density_and_give_a_known_one(tmp_path, monkeypatch) -> None:
    """In some of the steps, or with a tiny network, for the time that they take."""
    monkeypatch.setattr(config_files, "load", lambda name: tiny.config())
    page = LIBRARY.replace("runs/in_a_program", str(tmp_path))
    page = page.replace('"training.n_iters": 1000', '"training.n_iters": 300')
    page = page.replace("3000)", "1000)").replace(": 300}", f": 300, {QUICK}}}")
    assert page.count("300,") == 1
    assert page.count("1000)") == 4
    fitted, ran, trained, exact = examples(page)
    assert ran["result"].estimator == "bound"
    assert (tmp_path / "report.html").exists()
    assert fitted["log_p"].min() > -0.5  # 1.38 if learned exactly
    assert jnp.abs(fitted["drawn"][:, 0] - jnp.sin(2.0 * fitted["given"])).max() < 1.0
    truth = trained["data"].log_prob(trained["x"], jnp.full(256, 1e-5), trained["sde"])
    gap = truth - trained["ode"].log_p  # its mean is the KL divergence to the model
    standard_error = gap.std() / 16
    assert -4 * standard_error < gap.mean() < 0.1
    x = exact["x"]
    truth = -0.5 * jnp.sum(x**2, 1) / 4.0 - 1.5 * jnp.log(2.0 * jnp.pi * 4.0)
    assert jnp.abs(exact["result"].log_p - truth).max() < 2e-2  # the tolerance of the solver


def test_the_example_of_the_readme_learns_the_moons() -> None:
    """After some of the steps, on some of the points, for the time that they take."""
    few = f'DensityModel(changes={{"training.n_iters": 600, {QUICK}}})'
    page = README.replace("DensityModel()", few)
    page = page.replace("x[2000:]", "x[2000:2200]")
    assert page.count("2200") == 1
    assert page != README
    (shown,) = examples(page)
    assert -1.3 < shown["log_p"].mean() < -0.9  # -0.95 if learned exactly; a Gaussian has -1.9
    assert shown["error"].max() < 0.2


def test_the_example_of_the_reference_fits_a_gaussian() -> None:
    """After some of the steps, for the time that they take."""
    page = (ROOT / "docs" / "reference" / "density_model.md").read_text()
    few = page.replace('"training.n_iters": 500', f'"training.n_iters": 100, {QUICK}')
    few = few.replace("x[1000:])", "x[1000:1040])").replace(", 50, axis", ", 5, axis")
    assert few.count("1040") == 1
    few = few.replace('"training.n_iters": 200', f'"training.n_iters": 100, {QUICK}')
    shown, second = examples(few)
    score = second["ensemble"].score(second["y"][200:])
    assert score == pytest.approx(-1.58, abs=0.25)  # the entropy of the gamma law
    assert (second["ensemble"].sample(50) > 0.0).all()
    entropy = jnp.log(2.0 * jnp.pi) + 1.0 + jnp.log(0.6)
    assert abs(shown["log_p"].mean() + entropy) < 1.0
    assert shown["drawn"].shape == (5, 2)
    assert 0.0 < shown["noise"] < 0.5


def test_the_code_map_names_files_that_exist_and_all_modules() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().split("## Code map")[1]
    named = {n for row in table.splitlines()[6:] for n in re.findall(r"`([\w/]+(?:\.py)?/?)`", row)}
    modules = {p.name for p in ROOT.glob("*.py")} - {"setup.py"}
    assert modules <= named
    for name in named:
        if name.endswith((".py", "/")):
            assert (ROOT / name).exists(), name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_fields_files_and_links_of_a_page_exist(page: Path) -> None:
    text, config = page.read_text(), base.get_config()
    fields = re.findall(r"`?--config\.(\w+)\.(\w+)=", text)
    fields += re.findall(rf"`({SECTIONS})\.(?!py`)(\w+)(?=[`=])", text)
    for section, field in fields:
        assert field in config[section], f"{section}.{field}"
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", prose):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"--config=(configs/[\w/]+\.py)", text):
        assert (ROOT / name).exists(), name
