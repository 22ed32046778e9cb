.PHONY: style quality test bench nano

sources = src tests examples benchmarks setup.py

style:
	ruff check --fix $(sources)
	ruff format $(sources)

quality:
	ruff check $(sources)
	ruff format --check $(sources)

test:
	python -m pytest

bench:
	python benchmarks/turbo_vae.py

# Minutes on two cores; the models of the package had more.
NANO_BUDGET ?= 360

nano:
	bash examples/training/nano.sh $(NANO_BUDGET)
