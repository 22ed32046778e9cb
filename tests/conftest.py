"""Golden data of the original's own code, and tiny pipelines of the real classes."""

import json
import os
from pathlib import Path


# The golden tensors were computed with AVX2 kernels. MKL picks others on newer processors, which round differently;
# it has to be told before torch loads.
os.environ.setdefault("MKL_CBWR", "AVX2")

import pytest
import torch
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline
from safetensors.torch import load_file

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.checkpoints import convert_transformer_state_dict, transformer_config_from_state_dict


DATA = Path(__file__).parent / "data"
PROMPT = (
    'A woman with short grey hair looks at the camera and says, "Hello."\n\n'
    'Dialogue:\n<Woman, English>: "Hello."\n\nBackground Sound:\n<Quiet room>'
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def load_golden(case):
    """The description of a case and its tensors."""
    return json.loads((DATA / f"{case}.json").read_text()), load_file(DATA / f"{case}.safetensors")


def load_golden_weights(case):
    return load_file(DATA / f"{case}.weights.safetensors")


def make_golden_transformer(weights, **config):
    """A float32 transformer with golden weights, converted from the original's names."""
    weights = load_golden_weights(weights)
    config = transformer_config_from_state_dict(weights) | config
    model = MagiHumanTransformer3DModel(**config).eval()
    model.load_state_dict(convert_transformer_state_dict(weights, config))
    return model


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
