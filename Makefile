# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# Both need only python3.11 (or PYTHON=...) and make, and create .venv here.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Images and CI often set it. Then each process of the tests compiles all of them anew, which takes longer than the imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast coverage lint types docs links examples dist oldest newest check clean help

help:
	@echo "make demo      install, and train on 5,000 real MNIST digits with SGD, AdamW and KFC"
	@echo "make test      install, and run the tests"
	@echo "make test-fast install, and run the tests that are not marked slow (a minute and a half)"
	@echo "make coverage  install, run all tests once, and require 97 % of lines and branches"
	@echo "make lint      ruff and the import contract"
	@echo "make types     mypy"
	@echo "make docs      build the documentation into docs/_build/html"
	@echo "make links     open every link of the documentation to another site"
	@echo "make examples  run every example"
	@echo "make dist      build sdist and wheel into dist/, and try the wheel in an environment of its own"
	@echo "make oldest    the tests on the oldest supported torch and lightning, in .venv-oldest"
	@echo "make newest    the tests on the newest torch and lightning that were tried, in .venv-newest"
	@echo "make check     coverage, lint, types, docs, examples and dist"

demo: $(VENV)/installed
	@echo "==> Training on 5,000 MNIST digits with SGD, with AdamW, and with SGD and KFCCallback"
	$(BIN)/python examples/mnist_demo.py

test: $(VENV)/installed
	@echo "==> Running the tests"
	$(BIN)/python -m pytest -n $(WORKERS) $(TEST_OPTIONS)

test-fast: $(VENV)/installed
	@echo "==> Running the tests that are not marked slow"
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --hypothesis-profile fast

coverage:
	$(MAKE) test TEST_OPTIONS=--cov

lint: $(VENV)/installed
	@echo "==> Linting"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	@echo "==> Checking types"
	$(BIN)/mypy

docs: $(VENV)/installed
	@echo "==> Building the documentation"
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

links: $(VENV)/installed
	@echo "==> Checking the links of the documentation to other sites"
	$(BIN)/sphinx-build -q -W --keep-going -b linkcheck docs docs/_build/links

examples: $(VENV)/installed
	@echo "==> Running every example"
	$(BIN)/python examples/run_all.py

dist: $(VENV)/installed
	@echo "==> Building sdist and wheel, and trying the wheel"
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/try_wheel.py dist

oldest newest: %: .venv-%/installed
	@echo "==> Running the tests with constraints-$@.txt"
	.venv-$@/bin/python -m pytest -n $(WORKERS) $(TEST_OPTIONS)

.venv-%/installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e ".[dev]"
	@touch $@

check: coverage lint types docs examples dist

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "==> Creating $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	@echo "==> Installing lightning-kfc and what its tests and examples need (pinned by constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist docs/_build lightning_logs demo_logs
