"""Golden data of the original's own code."""

import json
from pathlib import Path

from safetensors.torch import load_file

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.checkpoints import convert_transformer_state_dict, transformer_config_from_state_dict

DATA = Path(__file__).parent / "data"


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
