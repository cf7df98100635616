.PHONY: all install test lint types floors docs bench zoo

all: lint types floors docs test

install:
	pip install -e '.[dev]'

test:
	pytest

lint:
	ruff check .

types:
	mypy

floors:
	lint-imports

docs:
	mkdocs build --strict

bench:
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; python "$$file"; done

SHARD ?= 1/1

zoo:
	python -m benchmarks.zoo --shard $(SHARD)
