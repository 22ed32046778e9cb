.PHONY: style quality cards test bench nano

sources = src tests examples benchmarks setup.py

style:
	ruff check --fix $(sources)
	ruff format $(sources)

quality:
	ruff check $(sources)
	ruff format --check $(sources)

cards:
	for variant in base distill sr-540p sr-1080p turbo-vae; do magihuman card $$variant -o model_cards/$$variant.md; done

test:
	python -m pytest

bench:
	python benchmarks/turbo_vae.py

# Minutes on two cores; the models of the package had more.
NANO_BUDGET ?= 360

nano:
	bash examples/nano/nano.sh $(NANO_BUDGET)
