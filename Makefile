# `make` lists the targets.
#   PYTHON       interpreter that makes .venv (default: python3.11, else python3)
#   TORCH_INDEX  package index that PyTorch comes from; empty is pip's own.
#                Linux without a GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS         further options for pytest: make test ARGS='-m "not slow" -k profil'
#   TIME_LIMIT   seconds that the tests of test-newest, and those of test-oldest, may take; a longer run is a failure

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
ARGS ?=
TIME_LIMIT ?= 1200

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
STAMP := $(VENV)/.installed
# Of the six files of the demo's data the one that is written last.
DEMO_DATA := runs/demo/data/validation.en

# pip writes a package's RECORD last, so a package without one was interrupted: such an environment is made anew.
HEALTHY := import pip, sys; from importlib.metadata import distributions; \
	sys.exit(sys.version_info < (3, 11) or any(d.read_text("RECORD") is None for d in distributions()))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-newest test-oldest bench docs style quality clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with everything the project needs
	@echo "Ready: $(VENV)"

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(RUN) -I -c '$(HEALTHY)' 2>/dev/null || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
			|| { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		echo "Making $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	}
	@echo "Installing the packages of constraints.txt (the first time takes a few minutes)"
	@$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) torch)
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP) | $(DEMO_DATA)  ## train and evaluate a small model on generated data
	@$(RUN) run_translation.py hub_configs/demo/recipe.json

$(DEMO_DATA): | $(STAMP)
	@$(RUN) -m training.embedded_data $(@D)

# One thread in each of the two workers: more would only wait for each other. Files in their order, since with those of
# most tests first, which pytest-xdist would do, slow ones of few tests come last, when the other worker has nothing to do.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## run all the tests
	@OMP_NUM_THREADS=1 $(RUN) $(PYTEST) $(ARGS)

# The ends of the window of versions in pyproject.toml. Each has an environment that lies over .venv and holds what differs.
# Each Transformers asks for a PEFT of its time, so the two move together.
# PyTorch is that of .venv unless TORCH_INDEX is given: pip's own index has its other versions for GPUs alone.
OVER = $(VENV)-$*
ENDS := transformers|peft$(if $(TORCH_INDEX),|torch|triton)
LOWEST := sed -nE 's/^ *"([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2.*/p' pyproject.toml
END_oldest := $(LOWEST) | grep -E '^($(ENDS))='
# The pinned version is its lower bound here: an index that has only older ones is skipped, as one that has none.
PINNED := sed -nE 's/^($(ENDS))==(.*)/s,^ *"\1>=[0-9.]+([^";]*).*,\1>=\2\\1,p/p' constraints.txt
END_newest := $(PINNED) | sed -nE -f /dev/stdin pyproject.toml
PINS_oldest := $(LOWEST)$(if $(TORCH_INDEX),, | grep -vE '^(torch|triton)=')
PINS_newest := grep -vE '^($(ENDS))=' constraints.txt
INSTALL = timeout 300 $(OVER)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
VERSIONS := -c 'import torch, transformers; print("Transformers", transformers.__version__, "and torch", torch.__version__)'

test-newest:  ## run the fast tests with the newest Transformers that pyproject.toml allows
test-oldest:  ## run them with the oldest version of each package that it allows
test-newest test-oldest: test-%: $(STAMP)
	@$(RUN) -m venv --clear --without-pip $(OVER)
	@realpath "$$($(RUN) $(PACKAGES))" > "$$($(OVER)/bin/python $(PACKAGES))/below.pth"
	@$(END_$*) > $(OVER)/end.txt
	@$(PINS_$*) > $(OVER)/pins.txt
	@if { $(INSTALL) --no-deps --ignore-installed -r $(OVER)/end.txt && $(INSTALL) -c $(OVER)/pins.txt -e '.[dev]'; } \
			2> $(OVER)/errors.txt; then \
		$(OVER)/bin/python $(VERSIONS) || exit; \
		OMP_NUM_THREADS=1 timeout --kill-after=30 $(TIME_LIMIT) $(OVER)/bin/python $(PYTEST) -m 'not slow' $(ARGS) || { \
			status=$$?; \
			case $$status in 124|137) echo "make $@ was stopped: its tests took more than $(TIME_LIMIT) seconds" >&2; esac; \
			exit $$status; \
		}; \
	elif [ $$? = 124 ] || grep 'No matching distribution' $(OVER)/errors.txt; then \
		echo "make $@ is skipped: the package index lacks a version that it needs, or cannot be reached"; \
	else cat $(OVER)/errors.txt >&2; exit 1; fi

bench: $(STAMP)  ## measure what can be measured here, and make docs/performance.md
	@$(RUN) -m benchmarks

docs: $(STAMP)  ## build the documentation site in site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

style: $(STAMP)  ## format the code and mend what ruff can mend
	@$(RUN) -m ruff check --fix . || left=1; $(RUN) -m ruff format . && test -z "$$left"

quality: $(STAMP)  ## check style, format and types; changes nothing
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

clean:  ## remove caches and build artefacts; .venv and runs/ stay
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .cache
	@find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
