# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIGHTNING := .venv-lightning
AVALANCHE := .venv-avalanche

.PHONY: install demo test test-all test-lightning test-avalanche docs docs-links notebook lint format clean

install: $(VENV)/.dev  ## the development environment in .venv

# The environment is made anew whenever the dependencies change.
$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/.dev || $(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

demo: $(VENV)/.demo  ## learn BBC News without forgetting; see evertune-demo/report.html
	$(BIN)/python examples/demo.py

# Tests wait for processes and servers a tenth of their time: so three files of quick tests run at a time on two cores,
# those that take longest first (tests/conftest.py).
PARALLEL := -m 'not slow' --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: install  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

test-all: test  ## the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The environment above without the other Lightning. Its files are hard links where the file system has them.
$(LIGHTNING)/.dev: $(VENV)/.dev
	rm -rf $(LIGHTNING)
	cp -al $(VENV) $(LIGHTNING) 2>/dev/null || { rm -rf $(LIGHTNING) && cp -a $(VENV) $(LIGHTNING); }
	$(LIGHTNING)/bin/python -m pip uninstall --quiet --yes pytorch-lightning
	rm $@  # a hard link to the other one
	touch $@

test-lightning: $(LIGHTNING)/.dev  ## the tests near Lightning, where only `lightning` is installed
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/python -m pytest $(PARALLEL) \
		tests/test_lightning.py tests/test_package.py \
		$(addprefix tests/,callbacks training strategies shards cli lightning_modules)

# The environment above and Avalanche, which must not get into it. Torchvision's wheels on PyPI are built for CUDA; this is
# the last version that can be imported beside a torch for CPU, without its operators, which nothing here uses. Its
# wheels are for Python 3.11 at most. Both it and pytorchcv would pull another torch in, so they come without dependencies.
$(AVALANCHE)/.dev: $(VENV)/.dev
	rm -rf $(AVALANCHE)
	cp -al $(VENV) $(AVALANCHE) 2>/dev/null || { rm -rf $(AVALANCHE) && cp -a $(VENV) $(AVALANCHE); }
	$(AVALANCHE)/bin/python -m pip install --quiet gdown gputil qpsolvers tensorboard wandb
	$(AVALANCHE)/bin/python -m pip install --quiet --no-deps avalanche-lib==0.6.0 pytorchcv torchvision==0.16.2
	rm $@  # a hard link to the other one
	touch $@

test-avalanche: $(AVALANCHE)/.dev  ## side by side with Avalanche
	OMP_NUM_THREADS=1 $(AVALANCHE)/bin/python -m pytest tests/avalanche

# The environment of the tests, which import what the reference describes.
$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

SPHINX := $(BIN)/python -m sphinx -W --keep-going -c docs .

docs: $(VENV)/.docs  ## the documentation site, in build/docs
	$(SPHINX) build/docs

docs-links: $(VENV)/.docs  ## whether the pages that the documentation links to answer; needs a network
	$(SPHINX) build/links -b linkcheck

notebook: install  ## examples/tutorial.ipynb from docs/tutorial.md
	$(BIN)/jupytext --quiet --to ipynb --set-kernel python3 --output examples/tutorial.ipynb docs/tutorial.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LIGHTNING) $(AVALANCHE) build dist *.egg-info
