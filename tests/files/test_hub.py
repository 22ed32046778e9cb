"""Repositories: their code without the package, their cards, and the public calls against a loopback hub."""

import ast
import json
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, ModularPipeline
from diffusers.utils.dynamic_modules_utils import find_pipeline_class, get_relative_imports
from golden import load_golden
from helpers import PROMPT, ROOT, WITHOUT_PACKAGE, make_low, run, upscale
from hub_server import HubServer
from huggingface_hub import ModelCard
from layouts import outputs, write_external_repositories, write_repositories
from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.loading import load_original_transformer
from diffusers_magihuman.tools.hub import (
    CARD_VARIANTS,
    PIPELINE_MODULES,
    make_code_file,
    make_licence_note,
    make_model_card,
    write_repository_code,
)


@pytest.fixture(scope="module")
def hub(tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    write_external_repositories(root)
    for name, pipe in (("tiny", tiny_distilled_pipeline), ("tiny-upscale", tiny_upscale_pipeline)):
        pipe.save_pretrained(root / "magihuman" / name)
        write_repository_code(root / "magihuman" / name)
    blocks = ModularPipeline.from_pretrained(root / "magihuman" / "tiny", trust_remote_code=True)
    blocks.load_components()
    blocks.save_pretrained(root / "magihuman" / "tiny-blocks")
    write_repository_code(root / "magihuman" / "tiny-blocks")
    with HubServer(root) as server:
        yield server


@pytest.fixture
def downloads(hub):
    hub.downloads.clear()
    return hub.downloads


@pytest.fixture(scope="module")
def cache(hub, tmp_path_factory):
    """Where downloads come from and go to, for calls in this process."""
    return {"endpoint": hub.endpoint, "cache_dir": tmp_path_factory.mktemp("cache")}


def run_script(hub, folder, script, **environment):
    """Runs a script whose hub is the loopback one; `call` in it runs a pipeline, `results` are returned."""
    latents, audio_latents = make_low()
    torch.save({"latents": latents, "audio_latents": audio_latents}, folder / "low.pt")
    before = f"""
import torch
from diffusers import DiffusionPipeline
results = {{}}
low = torch.load({str(folder / "low.pt")!r}, weights_only=True)
def call(pipe):
    size = {{"height": 64, "width": 96, **low}}
    if "Upscale" not in type(pipe).__name__:
        size = {{"height": 64, "width": 64, "num_frames": 9}}
    generator = torch.Generator().manual_seed(0)
    output = pipe({PROMPT!r}, num_inference_steps=2, generator=generator, output_type="latent", **size)
    return [output.frames, output.audio]
"""
    script = f"{before}{script}\ntorch.save(results, {str(folder / 'results.pt')!r})"
    result = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_PACKAGE if 'diffusers_magihuman' not in script else ''}{script}"],
        env={**hub.environment(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "results.pt", weights_only=True), result.stdout + result.stderr


# The code of a repository


def test_every_source_is_imported_by_name(hub):
    """Diffusers copies of a local directory what the file that it runs itself imports, and nothing else."""
    for name, files in (("tiny", 2), ("tiny-upscale", 2), ("tiny-blocks", 1)):
        folder = hub.root / "magihuman" / name
        entries = [path for path in (folder / "modular_blocks.py", folder / "pipeline.py") if path.exists()]
        assert len(entries) == files
        for entry in entries:
            sources = set(get_relative_imports(entry))
            assert sources < {path.stem for path in folder.glob("*.py")}
            for source in sources:
                text = (folder / f"{source}.py").read_text()
                assert set(re.findall(r"^from\.(\w+) import", text, re.MULTILINE)) <= sources
                assert not get_relative_imports(folder / f"{source}.py")  # which it would follow again and again
                original = next((ROOT / "src" / "diffusers_magihuman").rglob(f"{source}.py")).read_text()
                assert text == re.sub(r"\nfrom \.+(?=\w)", "\nfrom.", original)


@pytest.mark.parametrize("pipeline", [MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline])
def test_pipeline_file_exposes_one_pipeline(pipeline):
    module = ModuleType("pipeline")
    # As when another local directory was loaded before: Diffusers runs both files in the same module.
    module.Earlier = type("Earlier", (MagiHumanAudioVideoPipeline,), {"__module__": "diffusers_modules"})
    exec(make_code_file([pipeline.__name__], PIPELINE_MODULES, {"files"}), vars(module))
    assert find_pipeline_class(module) is pipeline


@pytest.mark.parametrize(
    "index", ['{"_class_name": "WanPipeline"}', '{"_class_name": "MagiHumanFlowScheduler"}', "[]", "{"]
)
def test_code_is_written_only_for_our_pipelines(index, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model_index\.json' must name one of the pipelines"):
        write_repository_code(tmp_path)
    with pytest.raises(OSError, match=r"model_index\.json"):
        write_repository_code(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`folder`=None must be a path"):
        write_repository_code(None)
    (tmp_path / "modular_model_index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model_index\.json' must name one of the pipelines"):
        write_repository_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", "modular_model_index.json"}


def test_repositories_load_without_the_package(hub, tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path):
    """Both pipelines, from the hub and from local directories, in one process; not before they are trusted."""
    results, _ = run_script(
        hub,
        tmp_path,
        f"""
import sys
for source in {[str(hub.root / "magihuman") + "/", "magihuman/"]!r}:
    for name in ("tiny", "tiny-upscale"):
        try:
            DiffusionPipeline.from_pretrained(source + name, custom_pipeline="pipeline")
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        else:
            raise RuntimeError("Code was run that nobody trusted.")
        pipe = DiffusionPipeline.from_pretrained(source + name, custom_pipeline="pipeline", trust_remote_code=True)
        assert type(pipe).__module__.split(".")[0] == "diffusers_modules"
        results[source, name] = call(pipe)
""",
    )
    assert len(results) == 4
    expected = {"tiny": run(tiny_distilled_pipeline), "tiny-upscale": upscale(tiny_upscale_pipeline)}
    for (_, name), output in results.items():
        assert torch.equal(output[0], expected[name].frames) and torch.equal(output[1], expected[name].audio)


def test_blocks_load_without_the_package(hub, tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path):
    """As above; also a preset, and a repository that blocks were saved to."""
    results, _ = run_script(
        hub,
        tmp_path,
        f"""
from diffusers import ModularPipeline
def call_blocks(pipe):
    size = {{"height": 64, "width": 96, **low}}
    if "Upscale" not in type(pipe).__name__:
        size = {{"height": 64, "width": 64, "num_frames": 9}}
    pipe.load_components()
    inputs = {{"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}}
    output = pipe(prompt={PROMPT!r}, **size, **inputs, output=["latents", "audio_latents"], output_type="latent")
    return [*output.values()]
for name, workflow in (({str(hub.root / "magihuman" / "tiny-upscale")!r}, None), ("magihuman/tiny", "text2video"),
                       ("magihuman/tiny-blocks", None)):
    try:
        ModularPipeline.from_pretrained(name)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise RuntimeError("Code was run that nobody trusted.")
    pipe = ModularPipeline.from_pretrained(name, workflow=workflow, trust_remote_code=True)
    assert type(pipe).__module__.split(".")[0] == "diffusers_modules"
    assert ("vae_encoder" in pipe.blocks.sub_blocks) == (workflow is None)
    results[name.split("/")[-1]] = call_blocks(pipe)
""",
    )
    assert len(results) == 3
    expected = {"tiny": run(tiny_distilled_pipeline), "tiny-upscale": upscale(tiny_upscale_pipeline)}
    for name, output in results.items():
        frames, audio = expected[name.replace("-blocks", "")].to_tuple()
        assert torch.equal(output[0], frames) and torch.equal(output[1], audio)


@pytest.mark.slow
@pytest.mark.parametrize("is_down", [False, True])
def test_cards_say_how_a_repository_with_its_code_loads_offline(is_down, hub, tiny_distilled_pipeline, tmp_path):
    call = """
from huggingface_hub import snapshot_download
pipe = DiffusionPipeline.from_pretrained({source}, custom_pipeline="pipeline", trust_remote_code=True)
results["output"] = call(pipe)
"""
    download = 'snapshot_download("magihuman/tiny")'
    card = make_model_card("distilled", "magihuman/tiny")
    assert f"`huggingface_hub.{download}`" in card and "`local_files_only=True`" in card
    run_script(hub, tmp_path, call.format(source=download))
    offline = download.replace(")", ", local_files_only=True)")
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9"} if is_down else {"HF_HUB_OFFLINE": "1"}
    results, _ = run_script(hub, tmp_path, call.format(source=offline), **environment)
    expected = run(tiny_distilled_pipeline)
    assert torch.equal(results["output"][0], expected.frames) and torch.equal(results["output"][1], expected.audio)


# The Hub


def test_repositories_load_with_the_package(hub, tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path):
    """From the hub, from the cache, and from a conversion that was pushed; no token is printed."""
    command = [
        "convert",
        "GAIR/daVinci-MagiHuman",
        str(tmp_path / "out"),
        "--variant",
        "distill",
        "--dtype",
        "float32",
    ]
    command += ["--with-text-encoder", "--with-vaes", "--push-to-hub", "someone/magihuman-distilled"]
    results, printed = run_script(
        hub,
        tmp_path,
        f"""
import diffusers_magihuman
from diffusers_magihuman.tools.cli import main
for name in ("tiny", "tiny-upscale"):
    pipe = DiffusionPipeline.from_pretrained(f"magihuman/{{name}}")
    assert type(pipe).__module__.split(".")[0] == "diffusers_magihuman"
    results[name] = call(pipe)
    results[f"{{name}} again"] = call(DiffusionPipeline.from_pretrained(f"magihuman/{{name}}", local_files_only=True))
assert main({command!r}) == 0
results["pushed"] = call(DiffusionPipeline.from_pretrained("someone/magihuman-distilled"))
""",
        HF_TOKEN="hf_secret_of_the_test",
    )
    expected = {"tiny": run(tiny_distilled_pipeline), "tiny-upscale": upscale(tiny_upscale_pipeline)}
    for name, output in expected.items():
        for key in (name, f"{name} again"):
            assert torch.equal(results[key][0], output.frames) and torch.equal(results[key][1], output.audio)
    assert results["pushed"][0].shape == (1, 4, 3, 4, 4) and results["pushed"][1].shape == (1, 9, 8)
    assert "hf_secret_of_the_test" not in printed
    pushed = hub.root / "someone" / "magihuman-distilled"
    assert json.loads((pushed / "model_index.json").read_text())["is_distilled"]
    assert '"someone/magihuman-distilled"' in (pushed / "README.md").read_text()


@pytest.mark.parametrize(
    "repo, subfolder",
    [
        ("GAIR/daVinci-MagiHuman", "distill"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p/transformer"),
        ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"),
        ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"),
    ],
)
def test_layouts_download_what_they_need_once(repo, subfolder, hub, cache, downloads):
    info, golden = load_golden("dit_base")
    model = load_original_transformer(repo, subfolder, dtype=torch.float32, **cache)
    assert downloads and all(name.startswith(f"{repo}/{subfolder}") for name in downloads)
    # FastVideo's folder has two of them.
    assert "/transformer" in subfolder or not any("/transformer/" in name for name in downloads)
    local = load_original_transformer(hub.root / repo, subfolder, dtype=torch.float32)
    downloads.clear()
    again = load_original_transformer(repo, subfolder, dtype=torch.float32, local_files_only=True, **cache)
    assert not downloads
    for other in (local, again):
        for output, same in zip(*(outputs(each, golden, info["text_len"]) for each in (model, other)), strict=True):
            assert torch.equal(output, same)


def test_from_original_downloads_only_what_it_needs(cache, downloads):
    pipe = MagiHumanAudioVideoPipeline.from_original(
        "GAIR/daVinci-MagiHuman", variant="distill", dtype=torch.float32, **cache
    )
    assert run(pipe).frames.shape == (1, 4, 3, 4, 4)
    original = "GAIR/daVinci-MagiHuman"
    folders = {"/".join(name.split("/")[:3]) for name in downloads if name.startswith(original)}
    assert folders <= {f"{original}/distill", f"{original}/turbo_vae"} and f"{original}/turbo_vae" in folders
    assert "google/t5gemma-9b-9b-ul2/model-00001-of-00002.safetensors" in downloads
    assert "google/t5gemma-9b-9b-ul2/model-00002-of-00002.safetensors" not in downloads

    pipe = MagiHumanLatentUpscalePipeline.from_original(original, variant="sr_1080p", dtype=torch.float32, **cache)
    assert pipe.config.default_height == 1088
    folders |= {"/".join(name.split("/")[:3]) for name in downloads if name.startswith(original)}
    assert folders - {f"{original}/distill"} == {f"{original}/1080p_sr", f"{original}/turbo_vae"}


@pytest.mark.parametrize("repo", ["google/t5gemma-9b-9b-ul2", "stabilityai/stable-audio-open-1.0"])
def test_gated_repository_is_named_with_its_page(repo, hub, tmp_path):
    hub.gated.add(repo)
    with pytest.raises(OSError, match=f"'{repo}' is gated. Open https://huggingface.co/{repo}"):
        MagiHumanAudioVideoPipeline.from_original(variant="distill", endpoint=hub.endpoint, cache_dir=tmp_path)
    hub.gated.clear()


def test_what_is_not_there_is_named(cache, downloads):
    with pytest.raises(OSError, match=r"https://huggingface\.co/nobody/nothing cannot be downloaded"):
        load_original_transformer("nobody/nothing", variant="distill", **cache)
    with pytest.raises(OSError, match=r"has no safetensors in \['distill'\]"):
        load_original_transformer("SanDiegoDude/daVinci-MagiHuman-FP8", variant="distill", **cache)
    assert not downloads


# Cards


@pytest.mark.parametrize("variant", CARD_VARIANTS)
def test_cards_are_complete(variant):
    card = make_model_card(variant)
    data = ModelCard(card).data
    assert data.library_name == "diffusers" and data.license == "apache-2.0" and len(set(data.tags)) == len(data.tags)
    assert data.base_model == "GAIR/daVinci-MagiHuman"
    tags = {"base": "text-to-video", "distilled": "text-to-video", "turbo-vae": None}
    assert data.pipeline_tag == tags.get(variant, "video-to-video")
    for part in ("## Use", "## Hardware", "## Limits", "## Responsible use", "## Licence", "## Citation"):
        assert part in card
    for part in ("Dialogue:", "Background Sound:", "640"):
        assert (part in card) == (variant != "turbo-vae")
    blocks = re.findall(r"```py\n(.*?)```", card, re.DOTALL)
    assert blocks and all(f"owner/magihuman-{variant}" in block and ast.parse(block) for block in blocks)


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
    card = make_model_card("distill", "someone/mine")
    assert '"someone/mine"' in card and "owner/" not in card
    with pytest.raises(ValueError, match="variant"):
        make_model_card("large")
    with pytest.raises(ValueError, match="Repo id"):
        make_model_card("base", 'a/b", evil="')
    assert "gated" in make_licence_note()
