"""The losses, against the pipeline's conventions: their velocity is the one that the scheduler follows."""

import pytest
import torch
from helpers import count_reads, seeded
from make_tiny_pipeline import make_transformer

from diffusers_magihuman import MagiHumanFlowScheduler
from diffusers_magihuman.training import (
    add_noise,
    distribution_matching_loss,
    drop_text,
    flow_matching_loss,
    predict_clean,
    sample_noise_levels,
    upscale_loss,
)


def make_batch(batch_size=2):
    generator = seeded(1)
    latents = torch.randn(batch_size, 8, 3, 4, 4, generator=generator)
    audio_latents = torch.randn(batch_size, 9, 8, generator=generator)
    embeds = torch.randn(batch_size, 5, 16, generator=generator)
    return latents, audio_latents, embeds, torch.arange(5) < torch.tensor([[5], [3]])[:batch_size]


class RecordingTransformer(torch.nn.Module):
    """Also keeps what the transformer was shown."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, video, audio, *args, **kwargs):
        self.seen = video, audio
        return self.transformer(video, audio, *args, **kwargs)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_have_their_distribution(shift):
    uniform = sample_noise_levels(20000, "uniform", shift, seeded())
    normal = sample_noise_levels(20000, "logit_normal", shift, seeded())
    for levels in (uniform, normal):
        assert levels.shape == (20000,) and levels.min() >= 0 and levels.max() <= 1
    unshifted = uniform / (shift - (shift - 1) * uniform)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(unshifted.quantile(quantiles), quantiles, atol=0.01, rtol=0)
    unshifted = normal / (shift - (shift - 1) * normal)
    expected = torch.distributions.Normal(0.0, 1.0).icdf(quantiles).sigmoid()
    torch.testing.assert_close(unshifted.quantile(quantiles), expected, atol=0.01, rtol=0)
    assert torch.equal(uniform, sample_noise_levels(20000, "uniform", shift, seeded()))


def test_shift_is_the_schedulers():
    scheduler = MagiHumanFlowScheduler()
    scheduler.set_timesteps(sigmas=[0.8, 0.4])
    shifted = [5 * level / (1 + 4 * level) for level in (0.8, 0.4)]
    torch.testing.assert_close(scheduler.sigmas[:2], torch.tensor(shifted))


def test_noise_and_velocity_are_the_schedulers():
    """One step of the scheduler along noise - latents, from pure noise to nothing, gives the latents."""
    latents, noise = torch.randn(2, 3, 8, 3, 4, 4, generator=seeded()).unbind()
    scheduler = MagiHumanFlowScheduler(sampler="renoise")
    scheduler.set_timesteps(4)
    level = scheduler.sigmas[2].expand(len(latents))
    noisy = add_noise(latents, noise, level)
    assert torch.equal(noisy, scheduler.scale_noise(latents, scheduler.timesteps[2:3].expand(3), noise))
    torch.testing.assert_close(predict_clean(noisy, noise - latents, level), latents, atol=1e-5, rtol=0)


def test_loss_is_the_error_of_the_velocity():
    model, (latents, audio_latents, embeds, mask) = make_transformer(), make_batch()
    levels = torch.tensor([0.3, 0.9])
    loss = flow_matching_loss(
        model, latents, audio_latents, embeds, mask, levels, video_weight=2.0, audio_weight=3.0, generator=seeded()
    )
    generator = seeded()
    noise, audio_noise = (torch.randn(states.shape, generator=generator) for states in (latents, audio_latents))
    video, sound = (
        (1 - level) * clean + level * noisy
        for clean, noisy, level in (
            (latents, noise, levels.view(2, 1, 1, 1, 1)),
            (audio_latents, audio_noise, levels.view(2, 1, 1)),
        )
    )
    velocity = model(video, sound, embeds, encoder_attention_mask=mask)
    video_loss = (velocity.sample - noise + latents).square().mean()
    audio_loss = (velocity.audio_sample - audio_noise + audio_latents).square().mean()
    torch.testing.assert_close(loss.video_loss, video_loss.detach())
    torch.testing.assert_close(loss.audio_loss, audio_loss.detach())
    torch.testing.assert_close(loss.loss, 2 * video_loss + 3 * audio_loss)
    assert loss.loss.requires_grad and not loss.video_loss.requires_grad


def test_losses_read_each_tensor_once():
    (latents, *rest), levels = make_batch(), torch.tensor([0.3, 0.9])
    weights = torch.ones(1)
    with count_reads() as reads:
        flow_matching_loss(make_transformer(), latents, *rest, levels, latent_weights=weights)
        upscale_loss(make_transformer(), latents, latents, *rest, levels)
    assert len(reads) == len((latents, *rest, levels, weights)) + len((latents, latents, *rest, levels))


def test_weights_say_which_positions_count():
    model, batch = make_transformer(), make_batch()
    levels, weights = torch.tensor([0.3, 0.9]), torch.zeros(2, 1, 3, 4, 4)
    weights[:, :, 1, :2] = 5.0

    def loss(**kwargs):
        return flow_matching_loss(model, *batch, levels, generator=seeded(), **kwargs)

    part = loss(latent_weights=weights)
    other = loss(latent_weights=weights.flip(3))
    assert part.video_loss != other.video_loss and part.audio_loss == other.audio_loss
    half = loss(latent_weights=(weights + weights.flip(3)) / 7)  # all of the middle frame, in any unit
    torch.testing.assert_close(half.video_loss, (part.video_loss + other.video_loss) / 2)
    assert loss(latent_weights=torch.ones(1)).video_loss == loss().video_loss


@pytest.mark.parametrize("part", ["image", "audio"])
def test_what_is_given_is_shown_clean_and_costs_nothing(part):
    model, batch = RecordingTransformer(make_transformer()), make_batch()
    latents, audio_latents, *_ = batch
    levels = torch.tensor([0.5, 0.8])

    def run(probability):
        options = {f"{part}_probability": probability, "audio_weight": 100.0, "generator": seeded()}
        return flow_matching_loss(model, *batch, levels, **options)

    plain = run(0.0)
    assert not any(torch.equal(seen, clean) for seen, clean in zip(model.seen, batch, strict=False))
    assert not torch.equal(model.seen[0][:, :, 0], latents[:, :, 0])
    given = run(1.0)
    if part == "image":
        assert torch.equal(model.seen[0][:, :, 0], latents[:, :, 0])
        assert not torch.equal(model.seen[0][:, :, 1], latents[:, :, 1])
        assert plain.video_loss != given.video_loss > 0
    else:
        assert torch.equal(model.seen[1], audio_latents) and not torch.equal(model.seen[0], latents)
        assert given.audio_loss == 0 < plain.audio_loss
    # The loss does not depend on what the model says about a given part.
    given.loss.backward()
    gradient = model.transformer.audio_proj_out.weight.grad
    assert gradient.any() == (part == "image")

    some = 0
    for seed in range(40):
        flow_matching_loss(model, *batch, levels, **{f"{part}_probability": 0.25}, generator=seeded(seed))
        shown = model.seen[0][:, :, 0] if part == "image" else model.seen[1]
        clean = latents[:, :, 0] if part == "image" else audio_latents
        some += sum(torch.equal(shown[i], clean[i]) for i in range(2))
    assert 8 <= some <= 33  # of 80, a quarter expected

    run(torch.tensor([0.0, 1.0]))
    shown, clean = (states[0][:, :, 0] if part == "image" else states[1] for states in (model.seen, batch))
    assert [torch.equal(*pair) for pair in zip(shown, clean, strict=True)] == [False, True]


@pytest.mark.parametrize("negative_length", [3, 8])
def test_text_is_dropped_for_the_negative_prompt(negative_length):
    _, _, embeds, mask = make_batch()
    negative = torch.randn(1, negative_length, 16)
    length = max(5, negative_length)
    kept, kept_mask = drop_text(embeds, mask, negative, 0.0)
    assert torch.equal(kept[:, :5], embeds) and torch.equal(kept_mask[:, :5], mask) and not kept_mask[:, 5:].any()
    dropped, dropped_mask = drop_text(embeds, mask, negative, 1.0)
    assert dropped.shape == (2, length, 16)
    assert torch.equal(dropped[:, :negative_length], negative.expand(2, -1, -1))
    assert dropped_mask.sum(dim=1).tolist() == [negative_length] * 2

    model, (latents, audio_latents, *_) = make_transformer(), make_batch()
    levels = torch.tensor([0.5, 0.5])
    padded = flow_matching_loss(model, latents, audio_latents, dropped, dropped_mask, levels, generator=seeded())
    alone = negative.expand(2, -1, -1)
    unpadded = flow_matching_loss(model, latents, audio_latents, alone, None, levels, generator=seeded())
    torch.testing.assert_close(padded.loss, unpadded.loss, atol=1e-5, rtol=0)


def test_training_learns_a_clip():
    model, (latents, audio_latents, embeds, _) = make_transformer().train(), make_batch(batch_size=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        levels = torch.tensor([0.7])
        loss = flow_matching_loss(model, latents, audio_latents, embeds, None, levels, generator=seeded()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_distribution_matching_has_the_gradient_of_the_paper():
    generated, real, fake = torch.randn(3, 2, 8, 3, 4, 4, generator=seeded()).unbind()
    generated.requires_grad_()
    distribution_matching_loss(generated, real, fake).backward()
    distance = (generated.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(generated.grad, (fake - real) / distance / generated.numel())


def test_distribution_matching_moves_a_generator_to_the_teacher():
    """Where the model of the student's output is perfect, the student ends where the teacher is."""
    teacher = torch.randn(1, 16, generator=seeded())
    student = torch.nn.Parameter(torch.zeros(1, 16))
    optimizer = torch.optim.SGD([student], lr=0.5)
    before = (student - teacher).square().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        distribution_matching_loss(student, teacher, student.detach()).backward()
        optimizer.step()
    assert (student - teacher).square().mean() < 0.05 * before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weighting": "cosine"}, "`weighting`='cosine' must be 'logit_normal' or 'uniform'"),
        ({"shift": 0.0}, "`shift`=0.0 must be a number in 0.001 to 1000"),
        ({"shift": float("nan")}, "`shift`=nan"),
        ({"batch_size": 10**12}, "`batch_size`=1000000000000 must be an integer in 1 to 1048576"),
    ],
)
def test_wrong_noise_levels_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_noise_levels(**{"batch_size": 2} | arguments)


def never(*_args, **_kwargs):
    pytest.fail("the transformer ran")


NAN = float("nan")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"latents": torch.full((2, 8, 3, 4, 4), NAN)}, "`latents` holds NaN"),
        ({"audio_latents": torch.zeros(1, 9, 8)}, r"`audio_latents` has shape \(1, 9, 8\)"),
        ({"prompt_embeds": torch.zeros(2, 5, 16).int()}, "`prompt_embeds`=.*floating"),
        ({"prompt_embeds_mask": torch.full((2, 5), 0.5)}, "`prompt_embeds_mask` must be true or 1"),
        ({"noise_levels": torch.tensor([0.5])}, r"`noise_levels` has shape \(1,\)"),
        ({"noise_levels": torch.tensor([0.5, NAN])}, "`noise_levels` holds NaN"),
        ({"noise_levels": torch.tensor([0.5, 2.0])}, "`noise_levels` must be in 0 to 1, but is in 0.5 to 2"),
        ({"noise_levels": 0.5}, "`noise_levels`=0.5 must be a dense tensor"),
        ({"video_weight": NAN}, "`video_weight`=nan"),
        ({"audio_weight": -1.0}, "`audio_weight`=-1.0"),
        ({"image_probability": 2.0}, "`image_probability`=2.0 must be a number in 0 to 1"),
        ({"audio_probability": torch.tensor([0.5, -1.0])}, "`audio_probability` must be in 0 to 1"),
        ({"latent_weights": torch.ones(2, 1, 2, 4, 4)}, "`latent_weights` has shape .* must have shape"),
        ({"latent_weights": -torch.ones(1)}, "`latent_weights` must be in 0 to"),
        ({"latent_weights": torch.tensor([NAN])}, "`latent_weights` holds NaN"),
    ],
)
def test_wrong_batches_raise(arguments, message):
    names = ("latents", "audio_latents", "prompt_embeds", "prompt_embeds_mask")
    batch = dict(zip(names, make_batch(), strict=True)) | {"noise_levels": torch.tensor([0.5, 0.8])}
    with pytest.raises(ValueError, match=message):
        flow_matching_loss(never, **batch | arguments)
    if arguments.keys() <= batch.keys():
        with pytest.raises(ValueError, match=message):
            upscale_loss(never, low_latents=batch["latents"], **batch | arguments)


def test_shapes_that_differ_raise():
    latents, _, embeds, mask = make_batch()
    levels = torch.tensor([0.5, 0.8])
    for mix in (add_noise, predict_clean):
        with pytest.raises(ValueError, match=r"must have shape \(2, 8, 3, 4, 4\)"):
            mix(latents, latents[:1], levels)
        with pytest.raises(ValueError, match="`noise_levels` must be in 0 to 1"):
            mix(latents, latents, levels + 1)
    with pytest.raises(ValueError, match="`low_latents` has shape"):
        upscale_loss(never, latents, latents[:, :, :1], make_batch()[1], embeds, mask, levels)
    for wrong in (torch.ones(1, 1), torch.full((2, 8), NAN)):
        with pytest.raises(ValueError, match="`fake_prediction`"):
            distribution_matching_loss(torch.ones(2, 8), torch.ones(2, 8), wrong)
    for probability in (2.0, -1, NAN):
        with pytest.raises(ValueError, match="`probability`="):
            drop_text(embeds, mask, embeds[:1], probability)
    with pytest.raises(ValueError, match="`negative_prompt_embeds` has shape"):
        drop_text(embeds, mask, embeds, 0.5)
