"""What a published repository holds besides weights: code that cannot drift from the package's, and valid cards."""

import ast
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, AutoencoderOobleck
from diffusers.utils.dynamic_modules_utils import find_pipeline_class, get_relative_imports
from helpers import PROMPT, ROOT, WITHOUT_PACKAGE, run
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.cli import main
from diffusers_magihuman.hub import (
    CARD_VARIANTS,
    PIPELINES,
    REGISTERED,
    flatten_sources,
    make_bundle,
    make_licence_note,
    make_model_card,
    make_pipeline_file,
    write_repository_code,
)


# Hides the package, which is installed here, before anything is imported.


@pytest.fixture(scope="module")
def published(tiny_distilled_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "tiny"
    tiny_distilled_pipeline.save_pretrained(path)
    write_repository_code(path)
    return path


def run_script(script, tmp_path, **environment):
    environment |= {"HF_HOME": str(tmp_path / "home"), "MKL_CBWR": os.environ["MKL_CBWR"]}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def load_and_run(source, arguments, output):
    return f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(source)!r}, {arguments})
output = pipe({PROMPT!r}, height=64, width=64, num_frames=9, num_inference_steps=2,
              generator=torch.Generator().manual_seed(0), output_type="latent")
torch.save([output.frames, output.audio], {str(output)!r})
print(type(pipe).__module__)
"""


def test_bundle_holds_the_sources_and_imports_nothing_relative():
    bundle = make_bundle()
    tree = ast.parse(bundle)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports and all(node.level == 0 for node in imports)
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert defined >= set(REGISTERED)
    assert bundle == make_bundle()
    for name in ("transformer_magihuman", "pipeline_components", "pipeline_magihuman_latent_upscale", "media"):
        source = (ROOT / "src" / "diffusers_magihuman" / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert ast.get_source_segment(source, node) in bundle


def test_written_code_compiles_and_diffusers_finds_its_imports(published):
    for name in ("pipeline", "magihuman_bundle"):
        compile((published / f"{name}.py").read_text(), name, "exec")
    assert get_relative_imports(published / "pipeline.py") == ["magihuman_bundle"]
    assert get_relative_imports(published / "magihuman_bundle.py") == []
    assert set(PIPELINES) < set(REGISTERED)


def test_modules_may_share_what_is_the_same():
    first = (
        "from diffusers import ModelMixin\nfrom diffusers.utils import logging\nlogger = logging.get_logger(__name__)"
    )
    second = first.replace("diffusers import", "diffusers.models.modeling_utils import")
    second = f"import torch.nn as nn\nfrom .first import (\n    logger,\n)\n{second}"
    flat = flatten_sources({"first": f'"""First."""\n{first}', "second": f'"""Second."""\n{second}'})
    assert "from .first" not in flat and flat.count("logger = ") == 2
    compile(flat, "flat", "exec")


@pytest.mark.parametrize(
    "second, message",
    [
        ("def size():\n    return 2\n", "`size` stands for different things in first.py and in second.py"),
        ("from os.path import getsize as size\n", "`size` stands for different things"),
        ("for size in (1, 2):\n    pass\n", "`size` stands for different things"),
        ("from .first import size as length\n", "second.py, line 2: `from .first import size as length` cannot be"),
        ("from . import first\n", "`from . import first` cannot be bundled"),
        ("def make():\n    from .first import size\n", "line 3: `from .first import size` cannot be bundled"),
    ],
)
def test_what_cannot_be_flattened_is_an_error(second, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flatten_sources({"first": '"""First."""\nsize = 1\n', "second": '"""Second."""\n' + second})


@pytest.mark.parametrize("pipeline", [MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline])
def test_pipeline_file_exposes_one_pipeline(pipeline):
    module = ModuleType("pipeline")
    # As when another local directory was loaded before: Diffusers runs both files in the same module.
    module.Earlier = type("Earlier", (MagiHumanAudioVideoPipeline,), {"__module__": "diffusers_modules"})
    exec(make_pipeline_file(pipeline.__name__), vars(module))
    assert find_pipeline_class(module) is pipeline


def test_repository_loads_without_the_package(published, tiny_distilled_pipeline, tmp_path):
    untrusted = f"""
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({str(published)!r}, custom_pipeline="pipeline")
except ValueError as error:
    assert "trust_remote_code" in str(error) and not any("magihuman_bundle" in name for name in sys.modules)
else:
    raise RuntimeError("Code was run that nobody trusted.")
"""
    arguments = 'custom_pipeline="pipeline", trust_remote_code=True'
    script = WITHOUT_PACKAGE + untrusted + load_and_run(published, arguments, tmp_path / "output.pt")
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "diffusers_modules" in result.stdout
    frames, audio = torch.load(tmp_path / "output.pt", weights_only=True)
    expected = run(tiny_distilled_pipeline)
    assert torch.equal(frames, expected.frames) and torch.equal(audio, expected.audio)


def test_repository_needs_no_trust_with_the_package(published, tiny_distilled_pipeline, tmp_path):
    script = "import diffusers_magihuman" + load_and_run(published, "", tmp_path / "output.pt")
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "diffusers_magihuman.pipeline_magihuman"
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True)[0], run(tiny_distilled_pipeline).frames)


@pytest.mark.parametrize(
    "index, message",
    [
        ('{"_class_name": "WanPipeline"}', "holds a WanPipeline, allowed are pipelines of diffusers_magihuman"),
        ('{"_class_name": "MagiHumanFlowScheduler"}', "holds a MagiHumanFlowScheduler, allowed are pipelines"),
        ("{}", "model_index.json' names no pipeline"),
        ("[]", "model_index.json' names no pipeline"),
        ("{", "model_index.json' names no pipeline"),
    ],
)
def test_code_is_written_only_for_our_pipelines(index, message, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        write_repository_code(tmp_path)
    with pytest.raises(OSError, match=r"model_index\.json"):
        write_repository_code(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]


@pytest.mark.parametrize("variant", CARD_VARIANTS)
def test_cards_are_valid_and_up_to_date(variant, tmp_path):
    card = make_model_card(variant)
    assert (ROOT / "model_cards" / f"{variant}.md").read_text(encoding="utf-8") == card, "run `make cards`"
    data = ModelCard(card).data
    assert data.to_dict() == yaml.safe_load(card.split("---")[1])
    assert data.library_name == "diffusers" and data.license == "apache-2.0" and len(set(data.tags)) == len(data.tags)
    assert data.language == ["zh", "yue", "en", "ja", "ko", "de", "fr"]
    tags = {"base": "text-to-video", "distill": "text-to-video", "turbo-vae": None}
    assert data.pipeline_tag == tags.get(variant, "video-to-video")
    validate_repo_id(data.base_model)
    assert "{{" not in card.replace("{{SII-GAIR}", "")
    for part in (
        "## Use",
        "## Hardware",
        "## Limits",
        "## Responsible use",
        "## Licence",
        "## Citation",
        "2603.21986",
    ):
        assert part in card
    for part in ("Dialogue:", "Background Sound:", "640"):
        assert (part in card) == (variant != "turbo-vae")
    blocks = re.findall(r"```py\n(.*?)```", card, re.DOTALL)
    assert blocks and all(f"owner/magihuman-{variant}" in block and ast.parse(block) for block in blocks)
    assert main(["card", variant, "-o", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == card


def test_figures_of_the_cards_are_those_of_the_models():
    # The published configs of Wan 2.2 and of the encoder of T5Gemma 9B; the other models have theirs as defaults.
    wan = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
    wan |= {"in_channels": 12, "out_channels": 12, "temperal_downsample": [False, True, True]}
    gemma = {"vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    gemma |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    module = T5GemmaModuleConfig(**gemma)
    with torch.device("meta"):
        transformer = MagiHumanTransformer3DModel()
        encoder = T5GemmaEncoderModel(T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False))
        audio_vae, turbo_vae = AutoencoderOobleck(), AutoencoderKLMagiHumanTurbo()
        wan_vae = AutoencoderKLWan(**wan, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    kept = {
        name for name, _ in transformer.named_parameters() if {*name.split(".")} & {*transformer._keep_in_fp32_modules}
    }
    kept = sum(transformer.get_parameter(name).numel() for name in kept)
    linears = count(transformer) - kept
    turbo = count(turbo_vae) + count(wan_vae.encoder) + count(wan_vae.quant_conv)
    total = 2 * linears + 4 * kept + 2 * count(encoder) + 2 * turbo + 4 * count(audio_vae)
    card = make_model_card("base")
    for gigabytes in (
        f"15.3B | {(2 * linears + 4 * kept) / 1e9:.1f} GB in bfloat16; {(linears + 4 * kept) / 1e9:.1f} GB with",
        f"{count(encoder) / 1e9:.1f}B | {2 * count(encoder) / 1e9:.1f} GB in bfloat16",
        f"{turbo / 1e9:.2f}B | {2 * turbo / 1e9:.1f} GB in bfloat16",
        f"{count(audio_vae) / 1e9:.2f}B | {4 * count(audio_vae) / 1e9:.1f} GB in float32",
        f"{total / 1e9:.1f} GB, all of them",
    ):
        assert gigabytes in card
    for model in (turbo_vae, wan_vae.encoder, wan_vae):
        row = f"| {count(model) / 1e9:.2f}B | {2 * count(model) / 1e9:.1f} GB | {4 * count(model) / 1e9:.1f} GB |"
        assert row in make_model_card("turbo-vae")


def test_card_names_the_repository_and_refuses_other_variants():
    assert '"someone/mine"' in make_model_card("distill", "someone/mine")
    with pytest.raises(ValueError, match="`variant`='large' must be one of"):
        make_model_card("large")
    assert "gated" in make_licence_note()
