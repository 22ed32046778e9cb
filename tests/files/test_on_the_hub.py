"""The public calls against a loopback hub, each in a process of its own, and again from the cache without it."""

import json
import subprocess
import sys

import pytest
import torch
from golden import DATA, load_golden, load_golden_weights
from helpers import PROMPT, WITHOUT_PACKAGE, run, upscale
from hub_server import HubServer
from layouts import dequantised, expected_model, fp8, outputs, write_external_repositories, write_repositories

from diffusers_magihuman.hub import write_repository_code


@pytest.fixture(scope="module")
def hub(tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    write_external_repositories(root)
    for name, pipe in (("tiny", tiny_distilled_pipeline), ("tiny-upscale", tiny_upscale_pipeline)):
        pipe.save_pretrained(root / "magihuman" / name)
        write_repository_code(root / "magihuman" / name)
    with HubServer(root) as server:
        yield server


def run_script(hub, cache, script, **environment):
    environment = {**hub.environment(cache), **environment}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


LOADS = """
import sys, torch
from safetensors.torch import load_file
from diffusers_magihuman.checkpoints import load_original_transformer
golden = load_file({golden!r})
results = {{}}
for repo, subfolder in {sources!r}:
    model = load_original_transformer(repo, subfolder, dtype=torch.float32)
    with torch.no_grad():
        results[repo + "/" + subfolder] = model(
            golden["in.video_latent"], golden["in.audio_latent"], golden["in.text"][:, :{length}], return_dict=False)
torch.save(results, {output!r})
"""
SOURCES = [
    ("GAIR/daVinci-MagiHuman", "base"),
    ("GAIR/daVinci-MagiHuman", "distill"),
    ("FastVideo/MagiHuman-Diffusers", "distill"),
    ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"),
    ("smthem/MagiHuman", "distill-merger_bf16.safetensors"),
    ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"),
]


def test_every_layout_loads_and_again_from_the_cache(hub, tmp_path):
    info, golden = load_golden("dit_base")
    output = tmp_path / "results.pt"
    arguments = {"golden": str(DATA / "dit_base.safetensors"), "sources": SOURCES, "length": info["text_len"]}
    script = LOADS.format(**arguments, output=str(output))
    hub.downloads.clear()
    result = run_script(hub, tmp_path / "cache", script)
    assert result.returncode == 0, result.stderr
    # Nothing but the asked-for folder or file of a repository is downloaded.
    for repo, _ in SOURCES:
        others = [name for name in hub.downloads if name.startswith(repo)]
        allowed = [folder for other, folder in SOURCES if other == repo]
        assert others and all(name.removeprefix(f"{repo}/").split("/")[0] in allowed for name in others)

    results = torch.load(output, weights_only=True)
    rounded = outputs(expected_model(dequantised(fp8(load_golden_weights("dit_base")))), golden, info["text_len"])
    for (repo, _), outs in zip(SOURCES, results.values(), strict=True):
        for index, name in enumerate(("video", "audio")):
            if repo.startswith(("GAIR", "FastVideo")):
                torch.testing.assert_close(outs[index], golden[f"fp32.out.{name}"], atol=1e-4, rtol=0)
            elif "FP8" in repo:
                assert torch.equal(outs[index], rounded[index])
            else:
                error = (outs[index] - golden[f"fp32.out.{name}"]).square().mean().sqrt()
                assert error < 0.02 * golden[f"fp32.out.{name}"].square().mean().sqrt()

    output.unlink()
    hub.downloads.clear()
    offline = run_script(hub, tmp_path / "cache", script, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0, offline.stderr
    again = torch.load(output, weights_only=True)
    assert not hub.downloads and all(torch.equal(again[key][0], results[key][0]) for key in results)


CALL = """
output = pipe({prompt!r}, height=64, width=64, num_frames=9, num_inference_steps=2,
              generator=torch.Generator().manual_seed(0), output_type="latent")
torch.save([output.frames, output.audio], {output!r})
"""


@pytest.mark.parametrize("has_package", [True, False])
def test_pipeline_in_our_format(has_package, hub, tiny_distilled_pipeline, tmp_path):
    trust = "" if has_package else ', custom_pipeline="pipeline", trust_remote_code=True'
    script = "import diffusers_magihuman" if has_package else WITHOUT_PACKAGE
    script += f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("magihuman/tiny"{trust})
""" + CALL.format(prompt=PROMPT, output=str(tmp_path / "output.pt"))
    expected = run(tiny_distilled_pipeline)
    # Without the package there is no second run: Diffusers itself asks the hub for the code's commit, offline or not.
    for environment in [{}, {"HF_HUB_OFFLINE": "1"}][: 1 + has_package]:
        result = run_script(hub, tmp_path / "cache", script, **environment)
        assert result.returncode == 0, result.stderr
        frames, audio = torch.load(tmp_path / "output.pt", weights_only=True)
        assert torch.equal(frames, expected.frames) and torch.equal(audio, expected.audio)


@pytest.mark.parametrize("has_package", [True, False])
def test_upscale_in_our_format_and_from_the_original(has_package, hub, tiny_upscale_pipeline, tmp_path):
    latents, audio_latents = torch.randn(1, 8, 3, 2, 4), torch.randn(1, 9, 8)
    torch.save([latents, audio_latents], tmp_path / "low.pt")
    trust = "" if has_package else ', custom_pipeline="pipeline", trust_remote_code=True'
    script = "import diffusers_magihuman" if has_package else WITHOUT_PACKAGE
    script += f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("magihuman/tiny-upscale"{trust})
latents, audio_latents = torch.load({str(tmp_path / "low.pt")!r}, weights_only=True)
def run(pipe):
    return pipe({PROMPT!r}, latents=latents[:, : pipe.transformer.config.in_channels], audio_latents=audio_latents,
                height=64, width=96, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                output_type="latent")
torch.save(run(pipe).frames, {str(tmp_path / "output.pt")!r})
"""
    if has_package:
        script += """
pipe = diffusers_magihuman.MagiHumanLatentUpscalePipeline.from_original(
    "GAIR/daVinci-MagiHuman", variant="sr_1080p", dtype=torch.float32)
assert run(pipe).frames.shape == (1, 4, 3, 4, 6) and pipe.config.default_height == 1088
"""
    hub.downloads.clear()
    result = run_script(hub, tmp_path / "cache", script)
    assert result.returncode == 0, result.stderr
    expected = upscale(tiny_upscale_pipeline, latents=latents, audio_latents=audio_latents)
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), expected.frames)
    folders = {"/".join(name.split("/")[:3]) for name in hub.downloads if name.startswith("GAIR")}
    wanted = {"GAIR/daVinci-MagiHuman/1080p_sr", "GAIR/daVinci-MagiHuman/turbo_vae"}
    assert folders == (wanted if has_package else set())


FROM_ORIGINAL = """
import torch
from diffusers_magihuman import MagiHumanAudioVideoPipeline
try:
    pipe = MagiHumanAudioVideoPipeline.from_original("GAIR/daVinci-MagiHuman", variant="distill", dtype=torch.float32)
except OSError as error:
    print("OSError:", error)
    raise SystemExit(3)
"""


def test_from_original_downloads_only_what_it_needs(hub, tmp_path):
    hub.downloads.clear()
    script = FROM_ORIGINAL + CALL.format(prompt=PROMPT, output=str(tmp_path / "output.pt"))
    result = run_script(hub, tmp_path / "cache", script)
    assert result.returncode == 0, result.stderr
    folders = {"/".join(name.split("/")[:3]) for name in hub.downloads if name.startswith("GAIR")}
    assert folders == {"GAIR/daVinci-MagiHuman/distill", "GAIR/daVinci-MagiHuman/turbo_vae"}
    assert "google/t5gemma-9b-9b-ul2/model-00001-of-00002.safetensors" in hub.downloads
    assert "google/t5gemma-9b-9b-ul2/model-00002-of-00002.safetensors" not in hub.downloads
    assert torch.load(tmp_path / "output.pt", weights_only=True)[0].shape == (1, 4, 3, 4, 4)


@pytest.mark.parametrize("repo", ["google/t5gemma-9b-9b-ul2", "stabilityai/stable-audio-open-1.0"])
def test_gated_repository_is_named_with_its_page(repo, hub, tmp_path):
    hub.gated.add(repo)
    result = run_script(hub, tmp_path / "cache", FROM_ORIGINAL)
    hub.gated.clear()
    assert result.returncode == 3, result.stderr
    assert f"Access to '{repo}' is gated. Open https://huggingface.co/{repo}, accept its terms" in result.stdout


def test_missing_repository_raises(hub, tmp_path):
    script = FROM_ORIGINAL.replace("GAIR/daVinci-MagiHuman", "nobody/nothing")
    result = run_script(hub, tmp_path / "cache", script)
    assert result.returncode == 3 and "https://huggingface.co/nobody/nothing cannot be downloaded" in result.stdout


def test_repository_without_the_folder_is_not_downloaded_whole(hub, tmp_path):
    hub.downloads.clear()
    script = FROM_ORIGINAL.replace("GAIR/daVinci-MagiHuman", "SanDiegoDude/daVinci-MagiHuman-FP8")
    result = run_script(hub, tmp_path / "cache", script)
    assert result.returncode == 3 and "has none of the folders ['distill']; `subfolder` may name" in result.stdout
    assert not hub.downloads


def test_convert_pushes_a_repository_that_loads(hub, tmp_path):
    command = [
        "convert",
        "GAIR/daVinci-MagiHuman",
        str(tmp_path / "out"),
        "--variant",
        "distill",
        "--dtype",
        "float32",
    ]
    command += ["--with-text-encoder", "--with-vaes", "--push-to-hub", "someone/magihuman-distill"]
    script = f"import sys; from diffusers_magihuman.cli import main; sys.exit(main({command!r}))"
    result = run_script(hub, tmp_path / "cache", script, HF_TOKEN="hf_secret_of_the_test")
    assert result.returncode == 0, result.stderr
    assert "hf_secret_of_the_test" not in result.stdout + result.stderr
    index = json.loads((hub.root / "someone" / "magihuman-distill" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "MagiHumanTransformer3DModel"] and index["is_distilled"]
    assert '"someone/magihuman-distill"' in (hub.root / "someone" / "magihuman-distill" / "README.md").read_text()
    script = """
import torch, diffusers_magihuman
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/magihuman-distill")
""" + CALL.format(prompt=PROMPT, output=str(tmp_path / "output.pt"))
    result = run_script(hub, tmp_path / "other-cache", script)
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "output.pt", weights_only=True)[1].shape == (1, 9, 8)
