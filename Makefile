# make demo | test | test-all | lint | kernels | test-oldest | clean
# Needs GNU make, a POSIX shell and Python 3.11 or later. Every target makes the environment it needs from nothing.

PYTHON ?= python3
VENV := .venv-make
VENV_OLDEST := .venv-oldest
VENV_KERNELS := .venv-make-kernels
OLDEST_TORCH := 2.11.0

BIN := $(VENV)/bin
PIP_FLAGS := --disable-pip-version-check --quiet --quiet
# What the extra `run` asks for, without triton: nothing here has a GPU.
RUN_NEEDS := torch safetensors tokenizers tensorboard
# A stamp names what an environment was made from; another pyproject.toml, pin, folder or Python makes a new one.
KEY := $(shell { cat pyproject.toml tests/constraints.txt; pwd; $(PYTHON) --version; } 2>/dev/null | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/made-from-$(KEY)
STAMP_OLDEST := $(VENV_OLDEST)/made-from-$(KEY)
# Triton and its interpreter want another NumPy, and nothing else of ours: an environment of its own, the package by its path.
KERNEL_NEEDS := torch triton numpy pytest pytest-xdist hypothesis
KEY_KERNELS := $(shell { cat tests/constraints-kernels.txt; pwd; $(PYTHON) --version; } 2>/dev/null | cksum | cut -d ' ' -f 1)
STAMP_KERNELS := $(VENV_KERNELS)/made-from-$(KEY_KERNELS)
PYTEST_FLAGS ?=
# One thread a process: two test workers, or two training processes, share the cores.
ONE_THREAD := OMP_NUM_THREADS=1

KERNELS_PYTHON := PYTHONPATH=src $(VENV_KERNELS)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint kernels test-oldest clean check-machine

help:
	@echo "make demo         plan a 70B, plan and run a tiny model on this machine twice, write demo/index.html (minutes)"
	@echo "make test         lint, types, and the tests of a machine without a GPU (20 to 45 minutes)"
	@echo "make test-all     the same with the slow tests (up to two hours)"
	@echo "make lint         ruff and pyright only"
	@echo "make kernels      GPU kernels without a GPU: tests in Triton's interpreter, then the static gate (Linux on x86-64)"
	@echo "make test-oldest  the tests with torch $(OLDEST_TORCH), the oldest supported (by hand: may install gigabytes)"
	@echo "make clean        remove environments, caches, builds and demo/ (not runs/)"

demo: SHARDPLAN := $(BIN)/shardplan
demo: $(STAMP)
	rm -rf demo && mkdir demo
	@echo "== 1. The fastest layout of a 70B on 64 H100"
	$(SHARDPLAN) plan llama-3-70b --cluster h100-ib --gpus 64 --global-batch 1024 --seq 8192 -o demo/llama-3-70b.json
	@echo "== 2. Measure this machine, then plan a tiny model for it in two layouts and run both"
	$(SHARDPLAN) calibrate -o demo/this-machine.toml
	$(SHARDPLAN) plan tiny --cluster demo/this-machine.toml --gpus 2 --global-batch 8 --seq 256 --fix "dp=2 zero=3" -o demo/tiny-zero3.json
	$(SHARDPLAN) run demo/tiny-zero3.json --steps 30 --out demo/runs
	$(SHARDPLAN) plan tiny --cluster demo/this-machine.toml --gpus 2 --global-batch 8 --seq 256 --fix "pp=2" -o demo/tiny-pp2.json
	$(SHARDPLAN) run demo/tiny-pp2.json --steps 30 --out demo/runs
	@echo "== 3. One page about all of it"
	$(SHARDPLAN) report demo/llama-3-70b.json demo/runs/* -o demo
	@echo "Open demo/index.html"

test: lint
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m "not slow" $(PYTEST_FLAGS)

test-all: lint
	$(ONE_THREAD) $(BIN)/pytest -n 2 $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_GLOBAL_NODE=off PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

kernels: $(STAMP_KERNELS)
	@echo "== Tests, in Triton's interpreter where there is no GPU"
	$(ONE_THREAD) PYTHONPATH=src $(VENV_KERNELS)/bin/pytest -n 2 tests/kernels $(PYTEST_FLAGS)
	@echo "== Static gate: every shipped kernel compiled; registers, spills, shared memory, tensor cores, TMA"
	$(KERNELS_PYTHON) -m shardplan.kernels.static_gate

test-oldest: $(STAMP_OLDEST)
	$(ONE_THREAD) $(VENV_OLDEST)/bin/pytest -n 2 -m "not slow" $(PYTEST_FLAGS)

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_KERNELS) demo build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-machine:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "shardplan needs Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -d src/shardplan/planner \
		|| { echo "this checkout has no symbolic links: run 'git config core.symlinks true' and check it out again" >&2; exit 1; }

$(STAMP): | check-machine
	@echo "making $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c tests/constraints.txt setuptools $(RUN_NEEDS)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c tests/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(STAMP_KERNELS): | check-machine
	@echo "making $(VENV_KERNELS) (a minute or two the first time)"
	$(PYTHON) -m venv --clear $(VENV_KERNELS)
	$(VENV_KERNELS)/bin/python -m pip install $(PIP_FLAGS) -c tests/constraints-kernels.txt $(KERNEL_NEEDS)
	@touch $@

$(STAMP_OLDEST): | check-machine
	@echo "making $(VENV_OLDEST) with torch $(OLDEST_TORCH)"
	$(PYTHON) -m venv --clear $(VENV_OLDEST)
	sed -e 's/^torch==.*/torch==$(OLDEST_TORCH)/' -e '/^sympy==/d' -e '/^setuptools==/d' tests/constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install $(PIP_FLAGS) -c $(VENV_OLDEST)/constraints.txt 'setuptools>=77' $(RUN_NEEDS)
	$(VENV_OLDEST)/bin/python -m pip install $(PIP_FLAGS) -c $(VENV_OLDEST)/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
