# Every target builds .venv/ first when it is missing or out of date; `make help` lists them.
# make itself ends with 2 whatever failed, and prints the command's own exit code as "Error N".
# For the code itself, call .venv/bin/v32.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup verify kernels test test-all lint clean FORCE

PYTHON ?= python3
# Passed on as they are: make verify ARGS="--config bench", make test ARGS=suites/meta
ARGS ?=
# Processes that make test uses; 0 runs the tests in pytest's own process.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.built-in
OTHER := .venv/transformers-5.17
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Tests see one thread per worker, no forked tokenizers, and no hub.
TEST_ENV := OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PARALLEL := $(if $(filter 0 1,$(WORKERS)),-n 0,-n $(WORKERS) --dist loadfile)
PARALLEL_ENV := $(if $(filter 0 1,$(WORKERS)),,OMP_NUM_THREADS=1)

help: ## say what each target does
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; \
	do printf '%-15s %s\n' "$$target" "$$text"; done

setup: $(STAMP) ## build .venv/ from nothing with the tested versions; quick when it stands
	@echo "The environment stands in .venv/."

verify: $(STAMP) ## compare the optimized model with the reference: v32 verify $(ARGS)
	@$(BIN)/v32 verify $(ARGS)

kernels: $(STAMP) ## compile every kernel for GPUs that need not be there, against its budget: v32 kernels $(ARGS)
	@$(BIN)/v32 kernels $(ARGS)

test: $(STAMP) ## run the fast suites
	@$(TEST_ENV) $(PARALLEL_ENV) $(BIN)/python -m pytest $(PARALLEL) \
	  -m "not slow and not gpu and not perf and not network" $(ARGS)

# In one process, because the perf tests must have the machine to themselves.
test-all: $(STAMP) $(OTHER)/.built ## run every suite that needs no GPU
	@$(TEST_ENV) V32_HYPOTHESIS_PROFILE=$${V32_HYPOTHESIS_PROFILE:-thorough} V32_OTHER_PYTHON=$(OTHER)/bin/python $(BIN)/python -m pytest -n 0 -m "not gpu" $(ARGS)

lint: $(STAMP) ## check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

clean: ## remove .venv/ and what the tools left behind; runs/ stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder that .venv/ was built in, because an environment that was copied along with
# the tree still runs the code it was copied from. It is written last: after an interruption there is
# none, and the next call starts from nothing.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

# torch comes first and alone, so that nothing else decides which build of it is taken. A CUDA build
# names the one triton that it works with; then our own pin of triton would contradict it, and is left out.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make setup needs Python 3.11 or newer, and '$(PYTHON)' is not that; name another: make setup PYTHON=python3.12" >&2; \
	  exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ]; then \
	  echo "Updating .venv/, because pyproject.toml or constraints.txt changed."; \
	  rm -f $@; \
	else \
	  echo "Building .venv/: this downloads torch and some eighty packages, and takes a few minutes."; \
	  rm -f $@; \
	  $(PYTHON) -m venv --clear .venv; \
	fi
	@{ sed '/^triton==/d' constraints.txt >.venv/constraints.txt && \
	  $(PIP_INSTALL) -c .venv/constraints.txt torch && \
	  if $(BIN)/python -c 'from importlib.metadata import requires; exit(any(r.startswith("triton") for r in requires("torch")))'; \
	  then cp constraints.txt .venv/constraints.txt; fi && \
	  $(PIP_INSTALL) -c .venv/constraints.txt -e '.[test,modal]'; } || { \
	  echo "make setup did not finish, because a package could not be installed (the reason stands above); nothing is lost: run it again." >&2; \
	  exit 1; }
	@echo "$(CURDIR)" >$@

# The other end of the range of transformers. Its own packages come first on its path, torch and the rest
# are those of .venv/.
$(OTHER)/.built: $(STAMP)
	@echo "Building $(OTHER)/: transformers 5.17 beside the tested version."
	@rm -rf $(OTHER) && $(PYTHON) -m venv $(OTHER)
	@$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet "transformers==5.17.0"
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$($(OTHER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/after.pth"
	@touch $@

FORCE:
