# Every target sets up what it needs in a virtual environment of the project's own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint bench docs clean

$(READY): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# nnssl_demo on a phantom dataset; DEMO passes options, such as DEMO="--folds 0"
demo: $(READY)
	$(BIN)/nnssl_demo $(DEMO)

# the CPU suite in two processes; TESTS passes options, such as TESTS="tests/planners -x"
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow" $(TESTS)

# what takes minutes each: stock nnU-Net's trainers and predictor to their ends, DINO's healthy and sick runs
test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu" $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

# the documents that are made from the code: docs/methods.md
docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info
