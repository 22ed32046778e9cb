"""Tiny pipelines of the real classes."""

import os

# The golden tensors were computed with AVX2 kernels. MKL picks others on newer processors, which round differently;
# it has to be told before torch loads.
os.environ.setdefault("MKL_CBWR", "AVX2")

import pytest
import torch
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline():
    return make_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_distilled_pipeline():
    return make_tiny_pipeline(is_distilled=True)


@pytest.fixture(scope="session")
def tiny_upscale_pipeline():
    return make_tiny_upscale_pipeline()


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tiny_distilled_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny_distilled_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_upscale_dir(tiny_upscale_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "tiny-upscale"
    tiny_upscale_pipeline.save_pretrained(path)
    return path
