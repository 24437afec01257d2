# The only list of commands. `make serve` on a fresh machine sets everything up and serves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The build of torch: `make install TORCH=cpu` or TORCH=cu130 (CUDA 13.0). The default is the one that is installed;
# on a fresh machine cu130 where there is an NVIDIA driver that is new enough for it, and cpu elsewhere.
BUILDS := cpu cu130
INSTALLED := $(firstword $(filter $(BUILDS),$(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*))))
DRIVER := $(shell { nvidia-smi --query-gpu=driver_version --format=csv,noheader; cat /proc/driver/nvidia/version; } 2>/dev/null \
  | grep -oE '[0-9]{3}\.[0-9.]+' | head -n 1)
OLDEST_DRIVER := 580
FITTING := $(shell test "$(firstword $(subst ., ,$(DRIVER)))" -ge $(OLDEST_DRIVER) 2>/dev/null && echo yes)
TORCH ?= $(or $(INSTALLED),$(if $(FITTING),cu130,cpu))
ifeq ($(filter $(TORCH),$(BUILDS)),)
$(error TORCH=$(TORCH) is not a build of torch; write one of: $(BUILDS))
endif
STAMP := $(VENV)/.installed-$(TORCH)
# What the tests need beside it: without a GPU its kernels run in Triton's interpreter. The CUDA build brings Triton along.
SYSTEM := $(shell uname -sm | tr ' ' -)
INTERPRETER := $(if $(filter cpu,$(TORCH)),$(if $(filter Linux-x86_64 Linux-aarch64,$(SYSTEM)),$(VENV)/.installed-triton))
JOBS ?= 2
LOCK := requirements/torch-$(TORCH).txt requirements/dev.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Nothing but wheels, each with one of the hashes in the lock; nothing beside what the lock names.
LOCKED := install --quiet --require-hashes --no-deps --only-binary :all:

.DEFAULT_GOAL := help
.PHONY: help install serve wheelhouse test quick sweeps newest check lint types format docs bench gpu zoo mutants evaluations clients web demo-model lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## create the virtual environment and install the lock into it (TORCH=cpu or cu130)

# Another build than the installed one, finished or not, begins with an empty environment: pip takes 2.13.0+cpu for 2.13.0.
# So does one from before there was a lock, where the distribution had another name.
OTHER = $(filter-out $(TORCH),$(INSTALLED)) $(wildcard $(VENV)/.installed) \
  $(if $(filter cu130,$(TORCH)),$(wildcard $(VENV)/lib/python3*/site-packages/torch-*+cpu.dist-info))

# torch first, and by itself: only it may come from its own index, and where pip finds it in a folder (PIP_FIND_LINKS)
# no index is asked.
$(STAMP): $(LOCK) pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "verbatim needs Python 3.11 to 3.14; set PYTHON=..."; exit 1; }
	@echo "installing the lock into $(VENV), with torch for $(TORCH) (another: make install TORCH=$(filter-out $(TORCH),$(BUILDS)))"
	@$(if $(DRIVER),$(if $(FITTING),,echo "the NVIDIA driver $(DRIVER) is older than $(OLDEST_DRIVER), which CUDA 13 wants"))
	@$(if $(strip $(OTHER)),$(PYTHON) -m venv --clear $(VENV))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip $(LOCKED) --no-index -r requirements/torch-$(TORCH).txt >/dev/null 2>&1 \
	  || $(BIN)/python -m pip $(LOCKED) -r requirements/torch-$(TORCH).txt
	@$(BIN)/python -m pip $(LOCKED) -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --editable .
	@$(BIN)/python -m pip check || { echo "$(VENV) holds something else, too; 'make clean' starts afresh"; exit 1; }
	@touch $@

$(VENV)/.installed-triton: $(STAMP) requirements/triton.txt
	@$(BIN)/python -m pip $(LOCKED) -r requirements/triton.txt
	@$(BIN)/python -m pip check || { echo "$(VENV) holds something else, too; 'make clean' starts afresh"; exit 1; }
	@touch $@

serve: $(STAMP)  ## serve models.yaml on http://127.0.0.1:8000 (ARGS="--port 9000")
	$(BIN)/verbatim serve $(ARGS)

wheelhouse: $(STAMP)  ## pack what serving needs into wheelhouse/, to install it where there is no network
	$(BIN)/verbatim bundle create wheelhouse --no-models --torch $(TORCH) $(ARGS)

test: $(STAMP) $(INTERPRETER)  ## run the whole suite, in two processes (JOBS=1: in one)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

quick: $(STAMP) $(INTERPRETER)  ## run the suite without the tests marked slow
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not sweep" $(ARGS)

sweeps: $(STAMP) $(INTERPRETER)  ## run what `make test` leaves out: all rows of every table, before a release
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m sweep $(ARGS)

newest:  ## run the suite with the newest releases that pyproject.toml allows, in .venv-newest
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --no-deps $(if $(filter cpu,$(TORCH)),--extra-index-url $(CPU_INDEX)) \
	  "$$(sed -n 's/^ *"\(torch[<>=].*\)",/\1/p' pyproject.toml)"
	.venv-newest/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-newest/bin/python -m pip list --not-required
	.venv-newest/bin/python -m pytest $(ARGS)

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

gpu: $(STAMP)  ## try everything on a graphics card; write one file and one page to send home (docs/guides/gpu.md)
	$(BIN)/python benchmarks/gpu_report.py $(ARGS)

zoo: $(STAMP)  ## examine every architecture; write docs/reference/architectures.md
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m zoo.sweep --page docs/reference/architectures.md $(ARGS)

# mutmut lives in an environment of its own, which also sees what the lock has installed.
mutants: $(STAMP)  ## break the code in small ways and count what no test notices (ARGS="--size 0 FILE": all of one)
	test -x .venv-mutants/bin/mutmut || { $(PYTHON) -m venv --clear .venv-mutants \
	  && $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-mutants/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth" \
	  && .venv-mutants/bin/python -m pip install --quiet mutmut==3.8.1; }
	nice .venv-mutants/bin/python tests/mutants.py $(ARGS)

# So do the harnesses. The stamp is written last: an environment without it is made again.
.venv-evals/.installed: requirements/evaluations.txt
	$(PYTHON) -m venv --clear .venv-evals
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-evals/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	.venv-evals/bin/python -m pip install --quiet --no-compile --require-hashes --no-deps -r requirements/evaluations.txt
	touch $@

evaluations: $(STAMP) .venv-evals/.installed  ## check that lm-eval's and inspect-ai's numbers do not move (ARGS="--limit 20")
	$(BIN)/python -m evaluations.check $(ARGS)

clients: $(STAMP)  ## run the clients of the registries; write docs/reference/clients.md (ARGS="codex llm", ARGS="--newest")
	PYTHONPATH=tests OMP_NUM_THREADS=1 nice $(BIN)/python -m clients.run $(ARGS)

web:  ## build the page into server/page/built (needs Node; ARGS=--screenshots: and make its pictures)
	cd web && npm ci --ignore-scripts --no-audit --no-fund && npm run build
	$(if $(filter --screenshots,$(ARGS)),OMP_NUM_THREADS=1 $(BIN)/python tests/web/screenshots.py)

demo-model: $(STAMP)  ## train the demo model again into demo/model (about two hours on two cores)
	$(BIN)/python -m demo.train $(ARGS)

lock:  ## lock again after a change in pyproject.toml (ARGS="--upgrade" for the newest of everything)
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv; }
	$(PYTHON) requirements/lock.py .venv-lock/bin/uv $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .venv-newest .venv-lock .venv-mutants .venv-evals .venv-clients .node-clients build dist web/node_modules *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
