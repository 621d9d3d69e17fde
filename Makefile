# On a machine with Python 3.11, 3.12 or 3.13 and make:  make demo   make test
VENV := .venv
# For a new .venv: the newest Python that starts and can make one, or that of `make PYTHON=...`.
PYTHON ?= $(shell for one in python3.13 python3.12 python3.11; do \
	if $$one -c "import ensurepip, venv" 2>/dev/null; then echo $$one; break; fi; done)
BIN := $(VENV)/bin
RUN := PYTHONPATH=. OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 $(BIN)/python

.PHONY: help install demo test test-slow lint docs format bench gpu clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## create .venv with everything that the other targets need

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "installing into $(VENV) (2.5 GB, or 6 GB with a CUDA build of torch)"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "sepdist needs Python 3.11, 3.12 or 3.13 with venv; on Debian 12:" \
		"apt-get install python3.11-venv; on Debian 13: apt-get install python3.13-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

demo: $(VENV)/.installed ## the whole system on generated speech: shard, pre-train, fine-tune, evaluate, separate
	$(RUN) -m sepdist shard write corpus=demo split=train output=demo/data/train num_workers=2
	$(RUN) -m sepdist shard write corpus=demo split=dev output=demo/data/dev
	$(RUN) -m sepdist shard write corpus=demo split=test output=demo/data/test
	$(RUN) -m sepdist train experiment=demo/pretrain
	$(RUN) -m sepdist train experiment=demo/finetune
	$(RUN) -m sepdist evaluate model=demo/runs/finetune data=demo/data/test output=demo/evaluation num_workers=2
	$(RUN) -m sepdist separate --overwrite --model demo/runs/finetune --output demo/separated demo/evaluation/listening/0/mixture.wav
	$(RUN) -m sepdist separate --overwrite --output demo/ready demo/evaluation/listening/0/mixture.wav
	@echo
	@echo "the same mixture, by the model that comes with the package: demo/ready/"
	@echo "separated voices:   demo/separated/mixture_s1.wav demo/separated/mixture_s2.wav"
	@echo "listening page:     demo/evaluation/listening/index.html"
	@echo "TensorBoard:        $(BIN)/tensorboard --logdir demo/runs"

test: $(VENV)/.installed ## the test suite in two processes (at most 10 minutes on 2 cores)
	$(RUN) -m pytest -n 2 --dist loadgroup

test-slow: $(VENV)/.docs ## the tests marked slow (one runs the tutorial's notebook)
	$(RUN) -m pytest -m slow

lint: $(VENV)/.installed ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs ## the documentation site, in docs/_build/html; a warning is an error
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "open docs/_build/html/index.html"

format: $(VENV)/.installed ## apply the fixes and the formatting of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## every benchmark, one JSON line each (about 50 minutes)
	$(RUN) -m benchmarks.shards
	$(RUN) -m benchmarks.loader
	$(RUN) -m benchmarks.operations
	$(RUN) -m benchmarks.models
	$(RUN) -m benchmarks.evaluation
	$(RUN) -m benchmarks.separation
	$(RUN) -m benchmarks.step_overhead
	$(RUN) -m benchmarks.reduction
	$(RUN) -m benchmarks.ssqp_memory
	$(RUN) -m benchmarks.resume
	$(RUN) -m benchmarks.scale
	$(RUN) -m benchmarks.chaos

gpu: $(VENV)/.installed ## on a machine with a GPU: its tests, then its benchmark, one JSON line (under 8 minutes)
	$(RUN) -m benchmarks.gpu --tests --limit 460

clean: ## remove the files of the demo and the caches of linters (not .venv, not runs)
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache
