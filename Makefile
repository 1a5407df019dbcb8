# make demo   install, then train and evaluate on handwritten digits; ends with a report to open
# make check  lint, and the tests that matter for most changes; a few minutes
# make test   install what the tests need, then lint and run every test
# make docs   build the pages of docs/ into runs/site
# make wheel  build the package, dist/fokker-VERSION-py3-none-any.whl
# make clean  remove the virtual environment, and what building the package left

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/digits_vp
BIN    := $(VENV)/bin
# Three workers keep two cores busy: tests wait for processes that they start, and for the disk.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -q
# Python compiles what is imported when it is: most of what is installed never is.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
DEMO   := $(BIN)/python main.py --config=configs/digits/vp.py --workdir=$(RUN)
# Of these files, all but what is marked slow; of whole runs, one that is resumed and evaluated.
QUICK  := architecture checkpoints configs dequantization fokker_planck high_order likelihood \
          losses operators parameterization records sde_lib taylor time_sampling train_state
WHOLE  := metrics_hold_each_step_once_after_a_resume run_folder_holds_what_the_readme_says

.PHONY: demo install check test lint docs wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/.installed
	$(DEMO) --mode=train,eval

install: $(VENV)/.installed

check: $(VENV)/.installed-test lint
	$(PYTEST) -m "not slow" $(QUICK:%=tests/test_%.py) $(WHOLE:%=tests/test_run_lib.py::test_%)

test: $(VENV)/.installed-test lint
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: | $(BIN)/python
	$(PIP) -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

wheel: | $(BIN)/python
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info

# A stamp file newer than the requirements means that nothing is left to install.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; call make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

REQUIRED := requirements.txt $(wildcard requirements/*.txt)

$(VENV)/.installed: $(REQUIRED) | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(REQUIRED) | $(BIN)/python
	$(PIP) -r requirements-test.txt
	@touch $(VENV)/.installed $@
