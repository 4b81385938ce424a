# make quickstart | make compare | make test | make check. Each sets up .venv by itself on a fresh machine.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# A test process for each core, each with whole files (their fixtures are made once). Eight need 12 GB.
WORKERS ?= auto
PARALLEL = --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install quickstart compare test test-vllm test-sglang test-gpu test-gpu-rehearsal check lint types unit clean

help:
	@echo "make quickstart   a small post-trained MoE becomes a dynamic one, end to end (minutes, on a CPU)"
	@echo "make compare      the methods and settings beside each other, three seeds (hours; goes on where it was stopped)"
	@echo "make test         every test (no GPU needed)"
	@echo "make test-vllm    exports in vLLM on the CPU (in .venv-vllm, 1.6 GB)"
	@echo "make test-gpu     checks that need one GPU with Transformer Engine (PYTHON=... for one outside .venv)"
	@echo "make check        lint, types and the fast unit tests"

install: $(STAMP)

# The first Python that can run the project, then uv (which brings one), else one line that says what to install.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	suits='import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))'; \
	if [ ! -x $(PY) ]; then \
		for candidate in python3.12 python3 python3.13; do \
			if $$candidate -c "$$suits" >/dev/null 2>&1; then \
				echo "creating $(VENV) with $$($$candidate --version)"; $$candidate -m venv $(VENV); break; \
			fi; \
		done; \
	fi; \
	if [ ! -x $(PY) ] && command -v uv >/dev/null 2>&1; then uv venv --seed --python 3.12 $(VENV); fi; \
	if [ ! -x $(PY) ]; then \
		echo "error: no Python 3.12 or 3.13 with the venv module found: install python3.12 and python3.12-venv, or uv" >&2; exit 1; \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP)
	$(PY) examples/quickstart/run.py --force

compare: $(STAMP)
	$(PY) examples/quickstart/compare.py

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(PY) -m pytest $(PARALLEL)

# vLLM in an environment of its own, which sees .venv's packages behind its own. -P: nothing of this folder is imported
# by chance, so the plugin is found as users find it.
VLLM := .venv-vllm
$(VLLM)/.installed: $(STAMP) tests/serving_vllm/requirements.txt
	$(PY) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/serving_vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	@touch $@

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -P -m pytest tests/serving_vllm

# SGLang's Python tree without its compiled parts (tests/serving_sglang/stubs), in an environment of its own.
SGLANG := .venv-sglang
$(SGLANG)/.installed: $(STAMP) tests/serving_sglang/requirements.txt
	$(PY) -m venv --clear $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/serving_sglang/requirements.txt
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(SGLANG)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	@touch $@

test-sglang: export OMP_NUM_THREADS = 1
test-sglang: $(SGLANG)/.installed
	$(SGLANG)/bin/python -P -m pytest tests/serving_sglang

# With another Python than .venv's (a container's), nothing is installed.
test-gpu: PYTHON ?= $(PY)
test-gpu: $(if $(PYTHON),,$(STAMP))
	ZEDA_TEST_GPU=1 $(PYTHON) -m pytest tests/gpu

test-gpu-rehearsal: export OMP_NUM_THREADS = 1
test-gpu-rehearsal: $(STAMP)
	ZEDA_TEST_GPU=rehearse $(PY) -m pytest tests/gpu

check: lint types unit

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

unit: export OMP_NUM_THREADS = 1
unit: $(STAMP)
	$(PY) -m pytest $(PARALLEL) tests/unit -m "not slow"

clean:
	rm -rf $(VENV) $(VLLM) $(SGLANG) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
