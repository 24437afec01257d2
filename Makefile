# The only list of commands. `make serve` on a fresh machine sets everything up and serves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test quick check lint types format docs bench demo-model clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## create the virtual environment and install into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "verbatim needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

serve: $(STAMP)  ## serve models.yaml on http://127.0.0.1:8000 (ARGS="--port 9000")
	$(BIN)/verbatim serve $(ARGS)

test: $(STAMP)  ## run the whole suite
	$(BIN)/python -m pytest $(ARGS)

quick: $(STAMP)  ## run the suite without the tests marked slow
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

check: lint types test  ## lint + types + tests: the definition of done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/reference from the code
	$(BIN)/python docs/generate.py

bench: $(STAMP)  ## measure speed (see benchmarks/README.md)
	$(BIN)/python benchmarks/overheads.py $(ARGS)

demo-model: $(STAMP)  ## train the demo model again into demo/model (about two hours on two cores)
	$(BIN)/python -m demo.train $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
