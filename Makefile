.PHONY: style quality test slow bench bench-gpu nano

sources = src tests examples benchmarks docs setup.py

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

# What fits a CPU, a quarter of an hour and 15 GB of disk.
bench:
	python benchmarks/turbo_vae.py --num-frames 29
	python benchmarks/roofline.py 256p --fuse
	python benchmarks/roofline.py 1080p --fuse
	python benchmarks/local_attention.py step
	python benchmarks/local_attention.py variants
	python benchmarks/memory.py table --size tiny
	folder=$$(mktemp -d) && python benchmarks/convert_checkpoint.py $$folder; rm -rf $$folder

# One GPU of 80 GB or more, at most eight minutes, no download.
bench-gpu:
	python benchmarks/gpu.py

# Minutes on two cores; the models of the package had more.
NANO_BUDGET ?= 360

nano:
	bash examples/nano/nano.sh $(NANO_BUDGET)
