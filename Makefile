.PHONY: style quality test bench

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
