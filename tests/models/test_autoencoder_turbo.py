"""The Turbo VAE against the original's outputs (decoder) and against Diffusers' Wan 2.2 VAE (encoder)."""

import json

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKLWan
from golden import DATA, load_golden, load_golden_weights

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo
from diffusers_magihuman.autoencoder_kl_magihuman_turbo import MagiHumanTurboResnetBlock3d
from diffusers_magihuman.checkpoints import convert_turbo_vae_state_dict

CASES = [
    ("turbo_vae", 1),
    ("turbo_vae", 3),
    ("turbo_vae", 4),
    ("turbo_vae", 8),
    ("turbo_vae_dw", 1),
    ("turbo_vae_dw", 4),
]
TINY = {
    "latent_channels": 8,
    "decoder_block_out_channels": (4, 4, 8, 8),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "first_chunk_size": 2,
    "step_size": 1,
    "latents_mean": (0.0,) * 8,
    "latents_std": (1.0,) * 8,
}
TINY_ENCODER = {"encoder_base_dim": 4, "encoder_dim_mult": (1, 1, 1, 1), "encoder_num_res_blocks": 1}


def golden_turbo_vae(case):
    config, tensors = load_golden(case)
    vae = AutoencoderKLMagiHumanTurbo.from_config(config["turbo_vaed_config"]).eval()
    vae.load_state_dict(convert_turbo_vae_state_dict(load_golden_weights(case), config["turbo_vaed_config"]))
    return vae, tensors, config


def golden_wan_vae():
    """Diffusers' VAE with the golden weights, and a Turbo VAE that has its encoder."""
    config, tensors = load_golden("wan_vae")
    weights = load_golden_weights("wan_vae")
    names = config["key_mapping_reference_to_diffusers"]
    wan = AutoencoderKLWan.from_config(config["diffusers_config"]).eval()
    wan.load_state_dict({names[key]: weight for key, weight in weights.items()})

    turbo = AutoencoderKLMagiHumanTurbo(encoder_base_dim=2, **{k: v for k, v in TINY.items() if "decoder" in k}).eval()
    encoder = {k: v for k, v in wan.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    missing, unexpected = turbo.load_state_dict(encoder, strict=False)
    assert not unexpected and all(key.startswith("decoder.") for key in missing)
    return wan, turbo, tensors


def statistics(tensors):
    return tensors["latents_mean"].view(1, -1, 1, 1, 1), tensors["latents_std"].view(1, -1, 1, 1, 1)


def denormalise(latents, tensors):
    mean, std = statistics(tensors)
    return latents / (1 / std) + mean


@pytest.fixture
def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKLMagiHumanTurbo(**TINY, **TINY_ENCODER).eval()


@pytest.mark.parametrize(("case", "num_frames"), CASES)
@torch.no_grad()
def test_decode_matches_original(case, num_frames):
    # The golden outputs themselves differ from a float64 run by 6e-6 (turbo_vae) and 2e-5 (turbo_vae_dw), rms 7e-7:
    # norms over two to ten channels of near-zero vectors magnify rounding. Wrong epsilons give an rms of 5e-6 or more
    # (but for the shortcuts', which have a test of their own), wrong structure 0.07 or more.
    vae, tensors, _ = golden_turbo_vae(case)
    sample = vae.decode(denormalise(tensors[f"in.latent_f{num_frames}"], tensors)).sample
    expected = tensors[f"out.video_f{num_frames}"]
    assert sample.shape == expected.shape
    error = (sample - expected).abs()
    assert error.max() < (2e-5 if case == "turbo_vae" else 1e-4)
    assert error.square().mean().sqrt() < 2e-6


@torch.no_grad()
def test_the_shortcut_is_normed_with_an_epsilon_of_its_own():
    vae, *_ = golden_turbo_vae("turbo_vae")
    blocks = [block for block in vae.decoder.modules() if isinstance(block, MagiHumanTurboResnetBlock3d)]
    block = next(block for block in blocks if block.conv_shortcut is not None)
    for conv in (block.conv2, block.conv_shortcut):
        conv.weight.zero_()
        conv.bias.zero_()
    block.conv_shortcut.weight[0, 0] = 1.0
    states = torch.full((1, block.conv1.in_channels, 1, 1, 1), 1e-3)  # their mean square is the epsilon of the config
    torch.testing.assert_close(block(states)[0, 0].flatten(), torch.tensor([0.5**0.5]))


@torch.no_grad()
def test_decode_matches_original_uint8():
    vae, tensors, _ = golden_turbo_vae("turbo_vae")
    video = vae.decode(denormalise(tensors["in.latent_f4"], tensors)).sample
    video = (video * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)[0].permute(1, 2, 3, 0)
    differences = (video.int() - tensors["out.uint8_f4"].int()).abs()
    assert differences.max() <= 1
    # Rounding differs between processors and moves values that sit on the edge of a step; rounding to the nearest
    # integer instead of truncating would move half of them.
    assert differences.count_nonzero() <= 1e-3 * differences.numel()


@pytest.mark.parametrize(("case", "num_frames"), CASES)
@torch.no_grad()
def test_windows_match_original(case, num_frames):
    vae, tensors, config = golden_turbo_vae(case)
    calls = []

    def record(_module, args, kwargs, output):
        calls.append({"latent_frames": args[0].shape[2], **kwargs, "out_frames": output.shape[2]})

    vae.decoder.register_forward_hook(record, with_kwargs=True)
    z = denormalise(tensors[f"in.latent_f{num_frames}"], tensors)
    windows = list(vae.decode_windows(z))
    assert calls == config["decoder_calls"][str(num_frames)]
    assert torch.equal(torch.cat(windows, dim=2), vae.decode(z).sample)


@pytest.mark.parametrize(("first_chunk_size", "step_size"), [(1, 1), (2, 3), (7, 7), (4, 1)])
@torch.no_grad()
def test_decode_frame_counts(first_chunk_size, step_size):
    vae = AutoencoderKLMagiHumanTurbo(**{**TINY, "first_chunk_size": first_chunk_size, "step_size": step_size})
    for num_frames in range(1, 9):
        sample = vae.decode(torch.randn(1, 8, num_frames, 1, 2)).sample
        assert sample.shape == (1, 3, 4 * num_frames - 3, 16, 32)


@pytest.mark.parametrize("name", ["image", "video"])
@torch.no_grad()
def test_encode_matches_wan(name):
    wan, turbo, tensors = golden_wan_vae()
    moments = turbo.encode(tensors[f"in.{name}"]).latent_dist.parameters
    assert torch.equal(moments, wan.encode(tensors[f"in.{name}"]).latent_dist.parameters)
    mean, std = statistics(tensors)
    latents = (moments.chunk(2, dim=1)[0] - mean) * (1 / std)
    torch.testing.assert_close(latents, tensors[f"out.encode_{name}"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_encode_matches_wan_for_more_frames():
    wan, turbo, _ = golden_wan_vae()
    video = torch.randn(2, 3, 13, 32, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turbo.encode(video).latent_dist.mode(), wan.encode(video).latent_dist.mode())


@torch.no_grad()
def test_slicing(tiny_vae):
    video, z = torch.randn(2, 3, 5, 16, 32), torch.randn(2, 8, 4, 1, 2)
    encoded, decoded = tiny_vae.encode(video).latent_dist.mode(), tiny_vae.decode(z).sample
    encoded_slices = torch.cat([tiny_vae.encode(x).latent_dist.mode() for x in video.split(1)])
    decoded_slices = torch.cat([tiny_vae.decode(x).sample for x in z.split(1)])
    torch.testing.assert_close(encoded_slices, encoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded_slices, decoded, atol=1e-5, rtol=1e-4)

    tiny_vae.enable_slicing()
    assert torch.equal(tiny_vae.encode(video).latent_dist.mode(), encoded_slices)
    assert torch.equal(tiny_vae.decode(z).sample, decoded_slices)
    tiny_vae.disable_slicing()
    assert torch.equal(tiny_vae.decode(z).sample, decoded)


@pytest.mark.parametrize("case", ["turbo_vae", "turbo_vae_dw"])
@torch.no_grad()
def test_tiles_meet_without_seams(case):
    """Golden weights, whose convolutions carry as far as they can; with separable ones and a pixel shuffle too."""
    vae, _, _ = golden_turbo_vae(case)
    z = torch.randn(1, vae.config.latent_channels, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(z).sample
    calls = []
    vae.decoder.conv_out.register_forward_hook(lambda _module, args, _output: calls.append(args[0].shape[-2:]))
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=64)
    tiled = vae.decode(z).sample
    assert len(calls) == 4 * 2  # tiles of two latents by four
    assert calls[0][0] < calls[0][1]  # the corner has one margin on either axis
    torch.testing.assert_close(tiled, expected, atol=2e-5, rtol=0)

    vae.decoder.tile_margin -= 2  # were the margin narrower, seams would show
    assert (vae.decode(z).sample - expected).abs().max() > 1e-3
    vae.disable_tiling()
    assert torch.equal(vae.decode(z).sample, expected)


@torch.no_grad()
def test_tiling_and_slicing_together(tiny_vae):
    z = torch.randn(2, 8, 4, 3, 5)
    expected = tiny_vae.decode(z).sample
    tiny_vae.enable_tiling(16, 32)
    tiny_vae.enable_slicing()
    torch.testing.assert_close(tiny_vae.decode(z).sample, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("size", [0, -16, 24, 32.0, True])
def test_tile_size_errors(size, tiny_vae):
    for name in ("tile_sample_min_height", "tile_sample_min_width"):
        with pytest.raises(ValueError, match=f"`{name}`={size!r} must be (a multiple of 16|an integer)"):
            tiny_vae.enable_tiling(**{name: size})
    assert not tiny_vae.use_tiling


@torch.no_grad()
def test_forward(tiny_vae):
    video = torch.randn(1, 3, 5, 16, 32)
    posterior = tiny_vae.encode(video, return_dict=False)[0]
    assert torch.equal(tiny_vae(video).sample, tiny_vae.decode(posterior.mode(), return_dict=False)[0])

    drawn = tiny_vae(video, sample_posterior=True, return_dict=False, generator=torch.Generator().manual_seed(0))[0]
    z = posterior.sample(generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, tiny_vae.decode(z).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(tiny_vae, dtype):
    z = torch.randn(1, 8, 3, 1, 2)
    expected = tiny_vae.decode(z).sample
    sample = tiny_vae.to(dtype).decode(z.to(dtype)).sample
    assert sample.dtype == dtype
    assert (sample - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


@pytest.mark.parametrize("encoder", [{}, TINY_ENCODER], ids=["without_encoder", "with_encoder"])
@torch.no_grad()
def test_save_load(encoder, tmp_path):
    vae = AutoencoderKLMagiHumanTurbo(**TINY, **encoder, decoder_is_dw_conv=(True, False, True, False, True)).eval()
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLMagiHumanTurbo.from_pretrained(tmp_path).eval()
    assert (loaded.encoder is None) == (not encoder)
    assert loaded.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in vae.state_dict().items())
    z = torch.randn(1, 8, 3, 1, 2)
    assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)


@pytest.mark.parametrize("encoder", [{}, TINY_ENCODER], ids=["without_encoder", "with_encoder"])
@pytest.mark.parametrize(
    "offload", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
@torch.no_grad()
def test_group_offload(encoder, offload):
    vae = AutoencoderKLMagiHumanTurbo(**TINY, **encoder).eval()
    video, z = torch.randn(1, 3, 5, 16, 32), torch.randn(1, 8, 3, 1, 2)
    decoded = vae.decode(z).sample
    encoded = vae.encode(video).latent_dist.mode() if encoder else None
    vae.enable_group_offload(onload_device=torch.device("cpu"), **offload)
    assert torch.equal(vae.decode(z).sample, decoded)
    if encoder:
        assert torch.equal(vae.encode(video).latent_dist.mode(), encoded)


@torch.no_grad()
def test_weights_on_disk(tiny_vae, tmp_path):
    video, z = torch.randn(1, 3, 9, 16, 32), torch.randn(1, 8, 3, 1, 2)
    encoded, decoded = tiny_vae.encode(video).latent_dist.mode(), tiny_vae.decode(z).sample
    blocks = {name: "disk" for name, module in tiny_vae.named_modules() if name.count(".") == 1}
    dispatch_model(tiny_vae, {**blocks, "quant_conv": "cpu", "encoder.conv_in": "cpu"}, offload_dir=tmp_path)
    assert torch.equal(tiny_vae.encode(video).latent_dist.mode(), encoded)
    assert torch.equal(tiny_vae.decode(z).sample, decoded)


def test_full_size():
    expected = json.loads((DATA / "full_arch.json").read_text())["turbo_vaed"]
    with torch.device("meta"):
        vae = AutoencoderKLMagiHumanTurbo()
    published = {key: torch.empty(shape, device="meta") for key, (shape, _) in expected["state_dict"].items()}
    shapes = {key: weight.shape for key, weight in vae.state_dict().items()}
    converted = convert_turbo_vae_state_dict(published, expected["config"])
    assert {key: weight.shape for key, weight in converted.items()} == shapes
    assert len(shapes) == expected["num_state_entries"] == 80
    assert vae.num_parameters() == expected["num_parameters"] == 107_122_892
    _, tensors = load_golden("turbo_vae")
    assert torch.equal(torch.tensor(vae.config.latents_mean), tensors["latents_mean"])
    assert torch.equal(torch.tensor(vae.config.latents_std), tensors["latents_std"])
    assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (16, 4)


def test_full_size_encoder():
    with torch.device("meta"):
        turbo = AutoencoderKLMagiHumanTurbo(encoder_base_dim=160)
        wan = AutoencoderKLWan(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        )
    shapes = {k: v.shape for k, v in wan.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    assert {k: v.shape for k, v in turbo.state_dict().items() if not k.startswith("decoder.")} == shapes


def test_conversion_is_strict():
    config, _ = load_golden("turbo_vae")
    weights = load_golden_weights("turbo_vae")
    weights["decoder.extra.weight"] = weights.pop("decoder.conv_out.conv.bias")
    with pytest.raises(ValueError, match=r"missing: decoder.conv_out.conv.bias; unknown: decoder.extra.weight"):
        convert_turbo_vae_state_dict(weights, config["turbo_vaed_config"])


def test_published_config_holds_more():
    """Options of the original of which one value is built, and keys of its training."""
    config, _ = load_golden("turbo_vae")
    config = config["turbo_vaed_config"] | {"aligned_feature_projection_mode": "conv", "aligned_blks_indices": [1, 2]}
    vae = AutoencoderKLMagiHumanTurbo.from_config(config)
    assert vae.config.first_chunk_size == 3
    assert "decoder_causal" in config and "decoder_causal" not in vae.config
    for option, value in (("decoder_causal", True), ("patch_size", 4), ("patch_size_t", 2), ("scaling_factor", 0.5)):
        with pytest.raises(ValueError, match=f"`{option}` must be .*, but is {value}"):
            AutoencoderKLMagiHumanTurbo.from_config(config | {option: value})


def test_ratios_follow_from_the_blocks():
    scaling = {"decoder_spatio_temporal_scaling": (False, False, True, True), "decoder_spatio_only": (False,) * 4}
    vae = AutoencoderKLMagiHumanTurbo(**TINY | scaling)
    assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (8, 4)
    assert vae.decode(torch.randn(1, 8, 3, 1, 2)).sample.shape == (1, 3, 9, 8, 16)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("decoder_layers_per_block", (1, 1), "must be a list or tuple of 5 entries"),
        ("decoder_layers_per_block", (1, 1, 1, 1, 10**7), "=10000000 must be an integer in 0 to 64"),
        ("decoder_layers_per_block", (1, 1, 1, 1, "8"), "='8' must be an integer"),
        ("decoder_spatio_temporal_scaling", (True,), "must be a list or tuple of 4 entries"),
        ("decoder_spatio_only", (True,), "must be a list or tuple of 4 entries"),
        ("decoder_is_dw_conv", (True,), "must be a list or tuple of 5 entries"),
        ("decoder_is_dw_conv", [True, 1, True, True, True], "=1 must be True or False"),
        ("decoder_block_out_channels", (4, 4, 8, 10**9), "=1000000000 must be an integer in 1 to 4096"),
        ("decoder_block_out_channels", (4, 4, 8, -8), "=-8"),
        ("decoder_block_out_channels", (), "must be a list or tuple of 1 or 2 or"),
        ("decoder_dw_kernel_size", 4, "=4 must be 1 or 3 or 5"),
        ("latent_channels", 4, "must be a list or tuple of 4 or 48 entries"),
        ("latents_mean", (torch.nan,) * 8, "=nan must be a number"),
        ("latents_std", (0.0,) * 8, "=0.0 must be a number"),
        ("first_chunk_size", 0, "=0 must be an integer in 1 to"),
        ("encoder_base_dim", "8", "='8' must be an integer"),
        ("encoder_base_dim", 4096, "too many for the layers"),
        ("encoder_dim_mult", (1, 3, 7, 4), "3 must divide 8"),
    ],
)
def test_config_errors(argument, value, message):
    config = {**TINY, "encoder_base_dim": 4} | {argument: value}
    with pytest.raises(ValueError, match=message):
        AutoencoderKLMagiHumanTurbo(**config)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 8, 2, 2), r"`z` has shape \(1, 8, 2, 2\), but must have shape \(any, 8, any, any, any\)"),
        ((1, 3, 2, 2, 2), "`z` has shape"),
        ((1, 8, 0, 2, 2), "no size 0"),
    ],
)
def test_decode_errors(shape, message, tiny_vae):
    for decode in (tiny_vae.decode, tiny_vae.decode_windows):
        with pytest.raises(ValueError, match=message):
            decode(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"`z`=.*torch.int64 must be a dense tensor of a floating dtype"):
            decode(torch.zeros(1, 8, 2, 2, 2, dtype=torch.int64))


def test_encode_errors(tiny_vae):
    with pytest.raises(ValueError, match=r"4 \* k \+ 1 frames, but has shape \(1, 3, 4, 16, 16\)"):
        tiny_vae.encode(torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=r"multiples of 16 .*, but has shape \(1, 3, 1, 40, 16\)"):
        tiny_vae.encode(torch.zeros(1, 3, 1, 40, 16))
    for wrong in (torch.zeros(1, 4, 1, 16, 16), torch.zeros(3, 1, 16, 16), torch.zeros(1, 3, 1, 16, 16).int(), None):
        with pytest.raises(ValueError, match="`x`"):
            tiny_vae.encode(wrong)
    with pytest.raises(ValueError, match=r"no encoder.*encoder="):
        AutoencoderKLMagiHumanTurbo(**TINY).encode(torch.zeros(1, 3, 1, 16, 16))


def test_each_window_brings_an_offloaded_model_back():
    class Onload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            module.float()
            return args, kwargs

    vae = AutoencoderKLMagiHumanTurbo(**TINY).eval()
    z = torch.randn(1, 8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(z).sample
        add_hook_to_module(vae, Onload())
        windows = []
        for window in vae.decode_windows(z):
            windows.append(window)
            vae.double()  # in place of another device, as a call that ends between two windows leaves it
    assert len(windows) > 1 and torch.equal(torch.cat(windows, dim=2), expected)
