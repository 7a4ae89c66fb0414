# Everything a fresh machine needs is made on demand: Python 3.11+, make and a C++ compiler are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/triaxial demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror src/triaxial/kernels/*.cpp src/triaxial/kernels/*.h
	$(BIN)/mypy

bench: $(READY)
	@for script in training schedules planner; do \
		if [ -f bench/$$script.py ]; then $(BIN)/python bench/$$script.py || exit 1; fi; done

# torch comes first, by itself: on a machine without a GPU its plain wheel would pull in several GB of CUDA.
$(READY): pyproject.toml constraints.txt $(wildcard src/triaxial/kernels/*.cpp src/triaxial/kernels/*.h)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[run,serve,dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
