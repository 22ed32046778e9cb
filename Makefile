.PHONY: style quality test slow bench nano

sources = src tests examples benchmarks setup.py

style:
	ruff check --fix $(sources)
	ruff format $(sources)

quality:
	ruff check $(sources)
	ruff format --check $(sources)

test:
	python -m pytest

slow:
	python -m pytest -m slow

# What fits a CPU, a quarter of an hour and 15 GB of disk; benchmarks/gpu.py runs what needs a GPU.
bench:
	python benchmarks/turbo_vae.py --num-frames 29
	python benchmarks/local_attention.py step
	python benchmarks/local_attention.py variants
	python benchmarks/memory.py table --size tiny
	folder=$$(mktemp -d) && python benchmarks/convert_checkpoint.py $$folder; rm -rf $$folder

# Minutes on two cores; the models of the package had more.
NANO_BUDGET ?= 360

nano:
	bash examples/nano/nano.sh $(NANO_BUDGET)
