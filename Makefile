PYTHON ?= python3
EK_REQUIRE_NATIVE ?= 1
VENV := .venv
BIN := $(VENV)/bin
comma := ,
INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*/*)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test lint bench clean

train: $(VENV)/.trainer
	@echo "Training ..."
	@$(BIN)/python -m trainer train $(ARGS)

test: lint
	@echo "Running the tests ..."
	@EK_REQUIRE_NATIVE=$(EK_REQUIRE_NATIVE) $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	@echo "Checking style and types ..."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.dev
	@echo "Running the benchmarks ..."
	@$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

clean:
	@echo "Removing $(VENV), build outputs and caches; runs/ stays ..."
	@rm -rf $(VENV) build dist *.egg-info entropy_kernels/*.so
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || \
		{ echo "PYTHON=$(PYTHON) is not found; Python 3.10 or newer is wanted" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.10 or newer is wanted" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

define install
	@echo "Installing .[$(1)] into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(1)]"
	@$(BIN)/python -c 'from entropy_kernels._native import why_missing as why; \
		print(why("cpu") or "Built entropy_kernels._cpu.")'
	@touch $(VENV)/.trainer $@
endef

$(VENV)/.trainer: $(VENV)/.created $(INPUTS)
	$(call install,trainer)

$(VENV)/.dev: $(VENV)/.created $(INPUTS)
	$(call install,trainer$(comma)gym$(comma)dev)
