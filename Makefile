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

# Programs that need what this repository does not have, and what is no program but a part of some.
NEEDY := accuracy analysis_authors networks overhead repair
PARTS := environment ways

bench:
	@set -e; for name in $(filter-out $(NEEDY) $(PARTS),$(basename $(notdir $(sort $(wildcard benchmarks/*.py))))); do \
		echo "== benchmarks/$$name.py"; python "benchmarks/$$name.py"; done
	@echo "Left out, since they need data (python benchmarks/NAME.py --help says more):"
	@echo "  networks, accuracy, repair, overhead: --data, a folder of CIFAR-10, and --weights, of a trained network"
	@echo "    (networks trains one); peers has more networks with --data"
	@echo "  analysis_authors: --records, what the authors' method chose, as its docstring says"

SHARD ?= 1/1

zoo:
	python -m benchmarks.zoo --shard $(SHARD)
