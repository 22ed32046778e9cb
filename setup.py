from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (root / "src/diffusers_magihuman/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
QUANTIZE = ["gguf>=0.17", "optimum-quanto>=0.2.6", "torchao>=0.18"]

setup(
    name="diffusers-magihuman",
    version=version,
    description="daVinci-MagiHuman, text to video of a speaking person with sound, as native Diffusers components",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The diffusers-magihuman authors",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_magihuman": ["model_cards/*.md", "embedded_models/*.*", "embedded_models/*/**"]},
    python_requires=">=3.10",
    install_requires=[
        "diffusers>=0.41",
        "transformers>=5.4",
        "torch>=2.10",
        "accelerate>=1.4",
        "filelock>=3.10.4",  # older ones can leave the process without its umask
        "safetensors>=0.8",
        "huggingface_hub>=1.32",
        "imageio-ffmpeg>=0.8",
        "numpy>=2.0",
        "pillow>=10.4",
        "psutil>=6.0",
        "scipy>=1.15",
        "soundfile>=0.12.1",
    ],
    extras_require={
        "scale": ["fastapi>=0.118", "python-multipart>=0.0.20", "ray[data]>=2.60", "uvicorn>=0.34"],
        "xformers": ["xformers>=0.0.35"],
        "train": ["peft>=0.20"],
        "quantize": QUANTIZE,
        "demo": ["gradio>=6.31"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0"],
        "dev": [
            "peft>=0.20",
            "playwright>=1.65",
            "pytest>=8",
            "ruff>=0.15",
            "pre-commit>=4",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            *QUANTIZE,
        ],
    },
    entry_points={"console_scripts": ["magihuman = diffusers_magihuman.tools.cli:run_process"]},
)
