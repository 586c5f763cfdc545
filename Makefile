# The commands of this project; CONTRIBUTING.md explains them. The first one on a fresh
# machine makes .venv and installs everything there; later ones find it in place.

PYTHON ?= python3
# A pin that pip can satisfy with a CPU-only build where its indexes offer one. A bare
# `torch` takes the newest build instead, and with it gigabytes of CUDA. On a machine
# with a GPU name the build you want: make test TORCH="torch==<version>+<cuda>".
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install lint style test test-full check bench proto chaos mutants environments kubernetes upgrades gate \
	reproduce demo train \
	docs wheel compile pure clean
.DELETE_ON_ERROR:

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

install: $(INSTALLED) ## make .venv and install the project with its tools

# Again whenever a dependency may have changed, and only then.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is missing or older than Python 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv $(VENV)' failed; is your system's python3-venv package installed?" >&2; \
	  rm -rf $(VENV); exit 1; }
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

# Hundreds of Pythons start in a run: each reads what the first has compiled, whatever the shell says of that.
unexport PYTHONDONTWRITEBYTECODE

# Files of tests go to processes as wholes, in the order that tests/conftest.py gives them: the longest first.
# Three on two cores, since many tests wait for processes that they have started. More of them cost what they gain:
# each reads every file of tests first.
JOBS ?= 3
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder --hypothesis-profile quick

lint: style ## format, lint and types
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

# mypy is one of the tests: tests/test_types.py.
test: style ## lint, types and every test that is not slow; some five minutes on two cores
	$(BIN)/pytest -m "not slow" $(SIDE_BY_SIDE)

# First files of tests side by side; then those tests that judge what they measure live, one after the other, since
# the next test would slow them down. Only their files are read then: reading all takes half a minute.
test-full: $(INSTALLED) ## what `make test` leaves out: the slow tests, and more examples of each property
	@failed=0; \
	$(BIN)/pytest -m "(slow or hypothesis) and not alone" -n $(JOBS) --dist loadfile --no-loadscope-reorder || failed=1; \
	$(BIN)/pytest -m alone $$(grep -rl --include='test_*.py' 'mark\.alone' tests) || failed=1; \
	exit $$failed

check: style ## lint, types and the tests that are quick; a minute
	$(BIN)/pytest -m "not slow and not e2e and not long" $(SIDE_BY_SIDE)

bench: $(INSTALLED) ## run the benchmarks; out/bench/*.json and a table
	$(BIN)/python -m loadgen.bench

proto: $(INSTALLED) ## describe gateway/rpc/inference.proto again, after it has changed
	$(BIN)/python -m grpc_tools.protoc -Igateway/rpc --descriptor_set_out=gateway/rpc/inference.binpb \
	  gateway/rpc/inference.proto

chaos: $(INSTALLED) ## 20,000 fault schedules through the real core on a virtual clock, of one router and of several
	$(BIN)/python -m loadgen.simulator.chaos
	$(BIN)/python -m loadgen.simulator.chaos.routers
	$(BIN)/python -m tests.loadgen.simulator.mutants

mutants: $(INSTALLED) ## break one line after the other; the unit tests must notice each; some minutes
	$(BIN)/python -m tests.mutants

environments: $(INSTALLED) ## 1,000 commands in hostile environments; half an hour
	$(BIN)/python -m tests.environments

# Kubernetes is built once, in half an hour, into ~/.cache/superserve/kubernetes or $SUPERSERVE_KUBERNETES. Debian 12
# and root; elsewhere it says why not.
kubernetes: $(INSTALLED) ## a real Kubernetes: install, upgrade, roll back, scale and drain under load
	$(BIN)/python -m tests.cluster.kubernetes

upgrades: $(INSTALLED) ## 100,000 queries across an upgrade, a drain and a scale-down on each of ENGINES
	$(BIN)/python -m tests.cluster.upgrades $(or $(ENGINES),podman slurm ray kubernetes)

# TRACES is a folder with Azure's files, which docs/traces.md says where to find; POLICY is who is judged. Every
# judgement is listed, so try a policy with `loadgen gate` first: see docs/gate.md.
gate: $(INSTALLED) ## judge the default policy in 200 cells, an hour at most; docs/judgements.md lists it
	$(BIN)/loadgen gate --judgement docs/judgements.json $(if $(TRACES),--traces "$(TRACES)") $(if $(POLICY),--policy "$(POLICY)")

# MAF is a day of Azure Functions 2019, which docs/traces.md says where to find: make reproduce MAF=FILE.
reproduce: $(INSTALLED) ## the paper's results made again, in twenty minutes; out/reproduce/results.md
	$(BIN)/python -m loadgen.paper.reproduce $(if $(MAF),--maf "$(MAF)")

demo: $(INSTALLED) ## serve a burst on this machine; out/demo/ and a table
	$(BIN)/python -m loadgen.demo

train: $(INSTALLED) ## train the digits supernet that the demo serves
	$(BIN)/python -m gpu_worker.models.train_digits

docs: $(INSTALLED) ## the API reference, from the docstrings; out/docs/index.html
	$(BIN)/python docs/reference.py out/docs

# The whole system, for every machine and compiled for this one, and the client alone; CONTRIBUTING.md says
# which one to install.
wheel: $(INSTALLED) ## build the wheels into dist/: the whole system, pure and compiled, and the client alone
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	SUPERSERVE_COMPILE=1 $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist wheels/client

compile: $(INSTALLED) ## compile the core in place with mypyc, some two minutes: twice as fast
	$(BIN)/python wheels/compile.py

pure: $(INSTALLED) ## remove what `make compile` made
	$(BIN)/python wheels/compile.py --remove

clean: ## remove results and caches; .venv stays (rm -r it to start over)
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
