# Needs Python 3.11 or newer and make; everything else goes into .venv. `make demo` and `make test` are the two to know.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT := demo/out
IN_WORK = $(if $(BENCH_WORK),--work $(BENCH_WORK))
BENCH = $(BIN)/python bench/end_to_end.py $(IN_WORK)
COPYING = $(BIN)/python bench/copying.py $(IN_WORK)

# Stamps: what is installed is installed again only when what it was installed from has changed.
TORCH := $(VENV)/.installed-torch
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

.NOTPARALLEL:
.PHONY: help demo test quick lint check bench tables clean

help:
	@echo 'make demo    repair the small pair that ships with the sources, and measure what it won back'
	@echo 'make test    every test; make quick leaves out the slow ones'
	@echo 'make lint    format, style and types; make check: that and every test'
	@echo 'make bench   measure, and fill the tables of README.md and docs'
	@echo 'make clean   remove .venv, caches and the demonstration output'

demo: $(DEMO)
	$(BIN)/streamrepair demo/pair/base demo/pair/ft $(OUT) --overwrite
	@echo
	$(BIN)/python demo/losses.py base=demo/pair/base ft=demo/pair/ft repaired=$(OUT)

test: $(DEV)
	$(BIN)/python -m pytest

quick: $(DEV)
	$(BIN)/python -m pytest -m 'not slow'

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# Two hours, much of it the plain in-memory way that is measured against. Pairs are made in the system's temporary folder
# (BENCH_WORK=DIR for another) and removed; the largest takes 17 GB there.
bench: $(DEMO)
	$(BIN)/python bench/per_matrix.py --repeats 3 --out bench/results/per-matrix-small.json \
	  --shape 896x896 --shape 2048x2048 --shape 4864x896 --shape 8192x2048
	$(BIN)/python bench/per_matrix.py --repeats 1 --out bench/results/per-matrix-large.json \
	  --shape 4096x4096 --shape 14336x4096
	$(BENCH) --arch llama-135m --spectrum heavy --name end-to-end-llama-135m-heavy --check
	$(BENCH) --arch llama-135m --spectrum gapped --name end-to-end-llama-135m-gapped --check
	$(BENCH) --arch qwen-0.5b --spectrum heavy --name end-to-end-qwen-0.5b-heavy --check --sample 40
	$(BENCH) --arch qwen-0.5b --spectrum gapped --name end-to-end-qwen-0.5b-gapped --check --sample 40
	$(COPYING) --arch qwen-0.5b --name copy-qwen-0.5b --repeats 8
	$(COPYING) --arch llama-8b --layers 4 --name copy-8b-4-layers --repeats 6
	$(COPYING) --arch llama-8b --layers 4 --max-shard 1GB --name copy-8b-4-layers-in-4 --repeats 6
	$(BENCH) --arch llama-8b --layers 8 --spectrum heavy --skip-reference --name 8b-8-layers
	$(BENCH) --arch llama-70b-layer --skip-reference --name 70b-layer-4GB -- --ram 4GB
	$(BIN)/python bench/budgets.py --only qwen-0.5b --workers 1 --workers 2 --json bench/results/budgets-qwen-0.5b.json
	$(BIN)/python bench/budgets.py --only llama-70b-layer --json bench/results/budgets-70b-layer.json
	$(BIN)/python bench/budgets.py --only embedding-70b --json bench/results/budgets-embedding-70b.json
	$(BIN)/python bench/plan_70b.py
	$(BIN)/python bench/loads.py
	$(BIN)/python bench/tables.py

tables: $(DEMO)
	$(BIN)/python bench/tables.py

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, by name and with its pin, so that pip settles on the pinned build before anything else asks for torch.
$(TORCH): constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	@touch $@

$(DEMO): $(TORCH) pyproject.toml streamrepair/version.py
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(DEV): $(TORCH) pyproject.toml streamrepair/version.py
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
