"""Diffusers' caches of steps through both pipelines, with guidance, whose branches must not mix."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig
from helpers import assert_same, make_inputs, make_tiny_model, run, upscale

STEPS = 4


def timestep(pipe):
    return lambda: pipe.current_timestep


# Made from the pipeline: a cache that never skips, and one that skips something in four steps.
CACHES = {
    "first_block": (lambda _: FirstBlockCacheConfig(threshold=-1.0), lambda _: FirstBlockCacheConfig(threshold=1e3)),
    "mag": (
        lambda _: MagCacheConfig(threshold=-1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
        lambda _: MagCacheConfig(threshold=1e3, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    ),
    "taylorseer": (
        lambda _: TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=1),
        lambda _: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ),
    "taylorseer lite": (
        lambda _: TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=1, use_lite_mode=True),
        lambda _: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=True),
    ),
    "sea": (lambda _: SeaCacheConfig(threshold=0.0), lambda _: SeaCacheConfig(threshold=1e3)),
    "pyramid": (
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 0),
            current_timestep_callback=timestep(pipe),
        ),
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=timestep(pipe),
        ),
    ),
    "faster": (
        lambda pipe: FasterCacheConfig(
            is_guidance_distilled=True,
            spatial_attention_timestep_skip_range=(-1, 0),
            current_timestep_callback=timestep(pipe),
        ),
        lambda pipe: FasterCacheConfig(
            is_guidance_distilled=True,
            spatial_attention_timestep_skip_range=(-1, 990),
            current_timestep_callback=timestep(pipe),
        ),
    ),
}


def make_runner(pipe, is_upscale):
    """A function that runs guided steps and says how often attention was computed in the second block."""
    calls = []
    processor = pipe.transformer.transformer_blocks[1].attn.processor

    class CountingProcessor(type(processor)):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    def run_and_count():
        calls.clear()
        call = upscale if is_upscale else run
        pipe.transformer.transformer_blocks[1].attn.set_processor(CountingProcessor())
        output = call(pipe, "One.", negative_prompt="Another one.", guidance_scale=3.0, num_inference_steps=STEPS)
        pipe.transformer.transformer_blocks[1].attn.set_processor(processor)
        return output, len(calls)

    return run_and_count


@pytest.mark.parametrize("is_upscale", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_cache_through_a_pipeline(name, is_upscale, request):
    pipe = request.getfixturevalue("tiny_upscale_pipeline" if is_upscale else "tiny_pipeline")
    run_and_count = make_runner(pipe, is_upscale)
    expected, num_calls = run_and_count()
    assert num_calls == 2 * STEPS

    for make_config, skips in zip(CACHES[name], (False, True), strict=True):
        pipe.transformer.enable_cache(make_config(pipe))
        try:
            output, num_calls = run_and_count()
            again, _ = run_and_count()
        finally:
            pipe.transformer.disable_cache()
        assert_same(again, output)  # nothing is left of the first call
        if skips:
            assert num_calls < 2 * STEPS and num_calls % 2 == 0
            assert not torch.equal(output.frames, expected.frames)
        else:
            assert num_calls == 2 * STEPS
            assert_same(output, expected)
    output, num_calls = run_and_count()
    assert num_calls == 2 * STEPS
    assert_same(output, expected)


@pytest.mark.parametrize("name", CACHES)
def test_branches_of_the_guidance_have_their_own_cache(name, tiny_pipeline):
    """A branch gives in turn with the other one what it gives alone."""
    transformer = tiny_pipeline.transformer
    video, audio = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 5, 8)
    texts = {"cond": torch.randn(1, 4, 16), "uncond": torch.randn(1, 4, 16)}

    @torch.no_grad()
    def denoise(*branches):
        transformer.enable_cache(CACHES[name][1](tiny_pipeline))
        outputs = {branch: [] for branch in branches}
        for step in range(STEPS):
            tiny_pipeline._current_timestep = 999 - 5 * step
            for branch in branches:
                context = {"step_index": step, "sigma": 0.9 - 0.1 * step, "num_inference_steps": STEPS}
                with transformer.cache_context(branch, **context):
                    outputs[branch].append(transformer(video + step, audio, texts[branch], return_dict=False)[0])
        transformer.disable_cache()
        return {branch: torch.stack(velocities) for branch, velocities in outputs.items()}

    together = denoise("cond", "uncond")
    for branch in texts:
        assert torch.equal(together[branch], denoise(branch)[branch])


def test_cache_that_joins_the_branches_raises():
    model = make_tiny_model()
    with pytest.raises(ValueError, match=r"`config`=FasterCacheConfig .* Set `is_guidance_distilled=True`"):
        model.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 500))
    assert not model.is_cache_enabled
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())


@torch.no_grad()
def test_lite_taylorseer_predicts_the_velocity():
    """Of inputs that change on a line, as the full mode does and near what is computed; it was zero."""
    model, inputs = make_tiny_model(local_attention_layers=(1,), local_attention_frames=1), make_inputs()
    steps = [[states * (1 + 0.01 * step) for states in inputs] for step in range(5)]
    expected = [model(*step, return_dict=False) for step in steps]
    errors = {}
    for is_lite in (False, True):
        options = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
        model.enable_cache(TaylorSeerCacheConfig(use_lite_mode=is_lite, **options))
        with model.cache_context("cond"):
            outputs = [model(*step, return_dict=False) for step in steps]
        model.disable_cache()
        pairs = zip(zip(*outputs, strict=True), zip(*expected, strict=True), strict=True)
        errors[is_lite] = max(
            max(((out - exact).norm() / exact.norm()).item() for out, exact in zip(*pair, strict=True))
            for pair in pairs
        )
    assert 0 < errors[True] < 0.01 and errors[False] < 0.01


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "not supported"),
        (TextKVCacheConfig(), "names no part of this transformer"),
        (TaylorSeerCacheConfig(cache_identifiers=["proj_out"]), "names no part of this transformer"),
        (TaylorSeerCacheConfig(cache_interval=0), "`cache_interval`=0 must be an integer in 1"),
        (TaylorSeerCacheConfig(disable_cache_before_step=0), "`disable_cache_before_step`=0"),
        (FirstBlockCacheConfig(threshold=float("nan")), "`threshold`=nan"),
        (
            PyramidAttentionBroadcastConfig(temporal_attention_block_skip_range=2, current_timestep_callback=int),
            "names no part of this transformer",
        ),
    ],
)
def test_cache_that_finds_nothing_raises(config, message):
    model = make_tiny_model()
    with pytest.raises(ValueError, match=message):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    model.enable_cache(FirstBlockCacheConfig())


@torch.no_grad()
def test_cache_works_outside_of_a_context():
    model, inputs = make_tiny_model(), make_inputs()
    expected = model(*inputs).sample
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    model.enable_cache(config)
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(config)
    assert torch.equal(model(*inputs).sample, expected)
    assert not torch.equal(model(*(tensor + 1 for tensor in inputs)).sample, expected)
    model._reset_stateful_cache()
    assert torch.equal(model(*inputs).sample, expected)
