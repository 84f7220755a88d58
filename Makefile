# `make demo` and `make test` are all the set-up a fresh machine needs: both create .venv, install, and run.
# TORCH chooses the build (the plain index may bring gigabytes of CUDA); PYTHON the interpreter.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
MINUTES ?= 8.5
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
DEMO := build/demo

.PHONY: help demo test check docs bench depth tiny ablations gpu clean

help:
	@echo "make demo    install, and ask perceptio-tiny a question about a picture"
	@echo "make test    install, and run the tests (CPU, offline)"
	@echo "make check   make test with the slow tests, after format and lint"
	@echo "make docs    write the documentation to build/site"
	@echo "make depth   train the depth tokenizer on rendered scenes, measure and freeze it (about an hour on two cores)"
	@echo "make tiny    train perceptio-tiny from scratch: teachers, scenes, fine-tuning; goes on where it was stopped"
	@echo "             (FROZEN=--frozen: with the teachers that are trained already)"
	@echo "make bench   run every benchmark under bench/, results in bench/results/"
	@echo "make ablations   train perceptio-tiny without each of its parts, and ask it with other depth codes"
	@echo "make gpu     perceptio-tiny and the 8B size on a CUDA device, MINUTES (8.5) at a time; run again to go on"

$(INSTALLED): setup.cfg pyproject.toml
	@echo "[1/3] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] torch ($(TORCH)), unless one is there"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "[3/3] perceptio"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEVELOPED): $(INSTALLED)
	@echo "development tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@mkdir -p $(DEMO)
	$(BIN)/perceptio see assets/cups.jpg "Where is the blue cylinder?" --out $(DEMO)/result.png

test: $(DEVELOPED)
	@echo "transformers' own common tests (fetched once)"
	@if test -f tests/fetch_upstream.py; then $(BIN)/python tests/fetch_upstream.py; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

check: $(DEVELOPED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@if test -f tests/fetch_upstream.py; then $(BIN)/python tests/fetch_upstream.py; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

docs: $(DEVELOPED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/zensical build --strict

bench: $(DEVELOPED)
	@for script in bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

depth: $(DEVELOPED)
	$(BIN)/python -m perceptio.vqvae.train --config recipes/depth/tiny.yaml --out build/depth-tiny
	$(BIN)/python -m perceptio.vqvae.maps build/depth-tiny/maps/test --split test --count 1000 --side 80
	$(BIN)/python -m perceptio.vqvae.export build/depth-tiny checkpoints/depth-tiny --maps build/depth-tiny/maps/test

tiny: $(DEVELOPED)
	$(BIN)/python -m perceptio.hub.train_tiny $(FROZEN)

ablations: $(DEVELOPED)
	$(BIN)/python bench/ablations.py --config recipes/ablations/tiny.yaml --tokens checkpoints/perceptio-tiny
	$(BIN)/python -m perceptio.hub.release checkpoints/perceptio-tiny --results build/ablations/codes/*/results.json

gpu: $(DEVELOPED)
	$(BIN)/python -m perceptio.hub.train_tiny $(FROZEN) --minutes $(MINUTES)
	$(BIN)/python bench/gpu.py

clean:
	rm -rf $(VENV) build .cache .pytest_cache .ruff_cache
