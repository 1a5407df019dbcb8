"""Build the package: one top-level name, `fokker`, for all modules and packages of this folder.

Here they are imported by names of their own (`import losses`), which elsewhere are the names of
others. The build puts them into `fokker/` and rewrites their imports, `from losses import x` to
`from fokker.losses import x`; nothing else of a module changes, and every line keeps its number.
"""

import ast
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NAME = "fokker"
ROOTS = ("configs", "experiments", "models", "run_lib")
PACKAGES = find_packages(str(ROOT), include=[*ROOTS, *(f"{root}.*" for root in ROOTS)])
OWN = {path.stem for path in ROOT.glob("*.py")} - {"setup"} | set(ROOTS)

GENERATED = {
    "__init__.py": '''"""Maximum-likelihood training and evaluation of diffusion models."""

import importlib
from typing import Any

from fokker.version import VERSION as __version__

MODELS = {"DensityModel": "density_model", "DensityEnsemble": "density_ensemble"}
__all__ = ["DensityEnsemble", "DensityModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a model when it is asked for: JAX takes seconds."""
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fokker.{MODELS[name]}"), name)
''',
    "__main__.py": '''"""The program: `python -m fokker`, and the command `fokker`."""

import runpy


def run() -> None:
    """Run main.py as the program that it is."""
    runpy.run_module("fokker.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
''',
    "py.typed": "",
}


def renamed(source: str, own: Collection[str] = OWN) -> str:
    """The text of a module, with the modules named in `own` imported from the package."""
    lines = source.encode().splitlines(keepends=True)
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in sorted(found, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        line = lines[node.lineno - 1]
        before, after = line[: node.col_offset], line[node.col_offset :]
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module.split(".")[0] in own:
                lines[node.lineno - 1] = before + re.sub(rb"^from\s+", b"from fokker.", after)
        elif any(alias.name.split(".")[0] in own for alias in node.names):
            if node.end_lineno != node.lineno:
                raise ValueError(f"an import of several lines: {ast.unparse(node)}")
            text = "; ".join(_imported(alias, own) for alias in node.names)
            lines[node.lineno - 1] = before + text.encode() + line[node.end_col_offset :]
    return b"".join(lines).decode()


def _imported(alias: ast.alias, own: Collection[str]) -> str:
    """The statement that binds the same name as `import alias`."""
    root, dot, _ = alias.name.partition(".")
    given = f" as {alias.asname}" if alias.asname else ""
    if root not in own:
        return f"import {alias.name}{given}"
    if not dot:
        return f"from {NAME} import {root}{given}"
    below = f"import {NAME}.{alias.name}{given}"
    return below if given else f"{below}; from {NAME} import {root}"


class BuildRenamed(build_py):
    """Copy every module into the package, with its imports rewritten."""

    def run(self) -> None:
        """Build the package anew, so that no module of an earlier build is left in it.

        Raises:
            SystemExit: an editable installation is asked for, whose modules would not be renamed.
        """
        if self.editable_mode:
            raise SystemExit("error: no editable installation: work in this folder (make install)")
        target = Path(self.build_lib, NAME)
        shutil.rmtree(target, ignore_errors=True)
        super().run()
        for name, text in GENERATED.items():
            (target / name).write_text(text, encoding="utf-8")

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package, without this one."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != (NAME, "setup")]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy one module and rewrite its imports."""
        built, copied = super().build_module(module, module_file, package)
        text = Path(module_file).read_text(encoding="utf-8")
        Path(built).write_text(renamed(text), encoding="utf-8")
        return built, copied


if __name__ == "__main__":
    setup(
        packages=[NAME, *(f"{NAME}.{package}" for package in PACKAGES)],
        package_dir={NAME: "."},
        cmdclass={"build_py": BuildRenamed},
    )
