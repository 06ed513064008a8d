# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint format clean

install: $(VENV)/.dev  ## the development environment in .venv

# The environment is made anew whenever the dependencies change.
$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
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

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
