PYTHON  ?= python3
WORKERS ?= 2
MODEL   ?= smollm2
BYTES   ?= 55%

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format bench docs clean

help:
	@echo "make demo      fit a real model into $(BYTES) of its bytes and write a report"
	@echo "make test      the tests, without those marked slow"
	@echo "make test-all  every test"
	@echo "make check     lint, types, documentation"
	@echo "make format    sort imports and apply safe lint fixes"
	@echo "make bench     speed and memory against the plain way, side by side"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make clean     remove everything the other targets made"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "layerwise needs Python 3.11 or newer")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: .venv/installed
	.venv/bin/layerwise optimize $(MODEL) --bytes $(BYTES)

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) -m 'not slow and not gpu'

test-all: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS)

check: .venv/installed docs
	.venv/bin/ruff check
	.venv/bin/mypy

format: .venv/installed
	.venv/bin/ruff check --fix

bench: .venv/installed
	.venv/bin/python -m benchmarks.spine

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

clean:
	rm -rf .venv build dist site runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
