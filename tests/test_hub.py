"""What a published repository holds besides weights: code that cannot drift from the package's, and valid cards."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PROMPT
from huggingface_hub import ModelCard
from test_pipeline import run

from diffusers_magihuman.cli import main
from diffusers_magihuman.hub import (
    CARD_VARIANTS,
    REGISTERED,
    make_bundle,
    make_licence_note,
    make_model_card,
    make_pipeline_file,
    write_repository_code,
)


ROOT = Path(__file__).parents[1]
# Hides the package, which is installed here, before anything is imported.
WITHOUT_PACKAGE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_magihuman":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


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
    for name in ("transformer_magihuman", "pipeline_magihuman", "media"):
        source = (ROOT / "src" / "diffusers_magihuman" / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert ast.get_source_segment(source, node) in bundle


def test_pipeline_file_exposes_one_pipeline():
    tree = ast.parse(make_pipeline_file("MagiHumanAudioVideoPipeline"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == {"MagiHumanAudioVideoPipeline", "magihuman_bundle"}


def test_repository_loads_without_the_package(published, tiny_distilled_pipeline, tmp_path):
    arguments = f"custom_pipeline={str(published / 'pipeline.py')!r}, trust_remote_code=True"
    script = WITHOUT_PACKAGE + load_and_run(published, arguments, tmp_path / "output.pt")
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


def test_code_is_not_run_without_trust(published, tmp_path):
    arguments = f"custom_pipeline={str(published / 'pipeline.py')!r}"
    result = run_script(WITHOUT_PACKAGE + load_and_run(published, arguments, tmp_path / "output.pt"), tmp_path)
    assert result.returncode != 0 and "trust_remote_code" in result.stderr
    assert not (tmp_path / "output.pt").exists()


def test_code_is_written_only_for_our_pipelines(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="holds a WanPipeline, allowed are pipelines of diffusers_magihuman"):
        write_repository_code(tmp_path)
    with pytest.raises(OSError, match=r"model_index\.json"):
        write_repository_code(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]


@pytest.mark.parametrize("variant", CARD_VARIANTS)
def test_cards_are_valid_and_up_to_date(variant, tmp_path):
    card = make_model_card(variant)
    assert (ROOT / "model_cards" / f"{variant}.md").read_text() == card, "run `make cards`"
    data = ModelCard(card).data
    assert data.library_name == "diffusers" and data.license == "apache-2.0" and data.base_model
    assert data.language == ["zh", "yue", "en", "ja", "ko", "de", "fr"] and "{{" not in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-to-video"
    for part in ("Dialogue:", "Background Sound:", "## Hardware", "## Limits", "## Responsible use", "## Citation"):
        assert part in card
    for block in re.findall(r"```py\n(.*?)```", card, re.DOTALL):
        ast.parse(block)
    assert main(["card", variant, "-o", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == card


def test_card_names_the_repository_and_refuses_other_variants():
    assert '"someone/mine"' in make_model_card("distill", "someone/mine")
    with pytest.raises(ValueError, match="`variant`='large' must be one of"):
        make_model_card("large")
    assert "gated" in make_licence_note()
