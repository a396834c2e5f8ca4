# demo test test-long lint types wheel docs: the same here and in CI (.ci/run).
#
#   make demo PYTHON=python3.12     another interpreter
#   make demo TORCH_INDEX=URL       a PyTorch index, e.g. that of its CPU builds (on Linux the
#                                   ordinary package index gives the large CUDA build)
#   make test TESTS=tests/test_run.py
#
# And `study`: what docs/explanation/appendix.md is made of, some hours; `make study WORKERS=4` on more cores.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TESTS ?= tests
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-long lint types wheel docs study
.NOTPARALLEL: # all of them share one virtual environment, and two share build/

demo: $(VENV)/installed
	$(BIN)/laptop compress --model tiny-sdxl --ratio 0.5 --to onnx,coreml -o demo
	@echo "The report is $(CURDIR)/demo/report.html (and report.md beside it)."

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder $(TESTS)

# Those marked `long`: several kills, whole runs twice, studies.
test-long: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder -m long $(TESTS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see through the editable install, so it checks the tree as it ships.
types: $(VENV)/installed-dev
	rm -rf build
	$(PIP) install --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p laptop

wheel: $(VENV)/installed-dev
	rm -rf build dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py dist/*.whl

# The site, in site/: open site/index.html.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Killed at any moment, the same command goes on.
study: $(VENV)/installed
	$(BIN)/python -m laptop.studies.retraining -o runs/study-distill --workers $(WORKERS)

# torch comes first, so that its build can be chosen; the version is the one that all extras were
# verified with together. The upper bound is coremltools', which has no wheels for Python 3.14.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): torch, then laptop with all extras (some minutes) ..."
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install -e '.[all]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -e '.[all,dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed-dev
	$(PIP) install -e '.[all,dev,docs]'
	@touch $@
