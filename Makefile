# Everything runs in .venv, which the first command creates and later ones reuse.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test acceptance bench lint audit clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        simulate the spliceosome, reconstruct it, show the results (about 5 minutes on 2 cores)"
	@echo "make test        the quick test suite"
	@echo "make acceptance  the slow tests as well"
	@echo "make bench       measure accuracy and speed, print the tables"
	@echo "make lint        ruff, the layers, the types"
	@echo "make audit       look up the tested versions in PyPI's database of known vulnerabilities"
	@echo "make clean       remove .venv and caches; data/, runs/ and mlflow.db stay"

# The stamp is written last, so that an interrupted installation starts again.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "aceray needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/aceray simulate demo --existing keep
	$(BIN)/aceray train demo --existing overwrite

test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow"

acceptance: $(READY)
	$(BIN)/python -m pytest -q

bench: $(READY)
	$(BIN)/python -m tests.bench

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# In an environment of its own, so that what audits is not audited. Strict: a package that the database does not have, as
# behind a mirror without it, is a failure and not a pass.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

clean:
	rm -rf .venv .venv-audit .pytest_cache .ruff_cache .import_linter_cache
