# PYTHON makes the environment, WORKERS is the number of test processes.
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin

.DELETE_ON_ERROR:
.PHONY: demo test lint check clean

demo: .venv/.installed
	@$(BIN)/edgeqdm demo --force

# One thread per process: more would fight over the cores with the other workers.
# A file stays with one worker, so that its fixtures are built once.
test: .venv/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/.installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/mypy --no-error-summary tools
	@$(BIN)/lint-imports --no-cache --no-logo

check: lint test

clean:
	@rm -rf build dist edgeqdm.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find edgeqdm backends profiles tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools is installed first and build isolation is off, so that the build is pinned too.
.venv/.installed: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "edgeqdm needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear .venv; }
	@echo "Installing into .venv; the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --no-build-isolation -e ".[onnxruntime,postgresql,dashboard,dev]"
	@touch $@
