# `make` is the supported way in: the order of installation matters (scripts/setup.sh says why).
# Empty: what .venv was made with, else python3, and gpu where nvidia-smi finds one.
PYTHON ?=
STACK ?=

# Ray jobs run whatever `python` is first on PATH: let that be this environment's.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup comet quantize demo test test-faults lint types format lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo
	@echo "  STACK=cpu|gpu overrides what the machine has; PYTHON=python3.12 names another interpreter (3.11 to 3.13)."

setup: ## Create .venv and install everything into it (2 to 10 minutes; at once when nothing changed)
	@PYTHON="$(PYTHON)" STACK="$(STACK)" bash scripts/setup.sh

comet: ## Create .venv-comet, the environment COMET runs in
	@PYTHON="$(PYTHON)" STACK="$(STACK)" bash scripts/setup_beside.sh comet

quantize: ## Create .venv-quantize, the environment llm-compressor quantises in
	@PYTHON="$(PYTHON)" STACK="$(STACK)" bash scripts/setup_beside.sh quantize

demo: setup ## Prune, heal, evaluate and serve Gemma 3 270M into runs/demo
	@$(IN_VENV) raylp run recipes/demo.yaml $(ARGS)

test: lint types ## Lint, types and all tests but the faults (ARGS="-k plan" narrows)
	@$(IN_VENV) python -m pytest -q $(ARGS)

test-faults: setup ## Tests that kill processes, fill disks and lose nodes
	@$(IN_VENV) python -m pytest -q -m faults $(ARGS)

lint: setup ## ruff: rules and format
	@$(IN_VENV) ruff check .
	@$(IN_VENV) ruff format --check .

types: setup ## mypy
	@$(IN_VENV) mypy raylp $(wildcard jobs/*.py benchmarks/*.py)

format: setup ## Rewrite the code as ruff would have it
	@$(IN_VENV) ruff check --fix .
	@$(IN_VENV) ruff format .

lock: setup ## Resolve requirements/*.in anew into requirements/*.txt
	@bash scripts/lock.sh

clean: ## Remove the environments and caches (runs/ stays)
	rm -rf .venv .venv-comet .venv-quantize .mypy_cache .pytest_cache .ruff_cache .hypothesis build raylp.egg-info
	find raylp tests jobs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
