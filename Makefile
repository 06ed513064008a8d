# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIGHTNING := .venv-lightning

.PHONY: install demo test test-all test-lightning lint format clean

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

# A test that starts several processes has a core for each of two: so the quick tests run two files at a time.
test: install  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile

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
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile \
		tests/test_lightning.py tests/test_package.py \
		$(addprefix tests/,callbacks training strategies shards cli lightning_modules)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LIGHTNING) build dist *.egg-info
