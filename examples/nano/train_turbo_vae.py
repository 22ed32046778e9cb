# SPDX-License-Identifier: Apache-2.0
"""Distils the Turbo VAE: a light decoder, all of whose convolutions see both past and future, from that of a Wan VAE.

    python examples/nano/train_turbo_vae.py --data data/128 data/256 --teacher runs/video_vae \\
        --output runs/turbo_vae

The student learns to draw what the teacher draws of the same latents, and half as much what is true. Its encoder is
the teacher's.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from make_dataset import load_dataset
from recipe import Run, make_parser, save_sheet, to_frames, to_tensor
from train_video_vae import Projection, decode, detail_weights, draw_crops

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo


def make_turbo_vae(teacher: AutoencoderKLWan, window: int = 13) -> AutoencoderKLMagiHumanTurbo:
    """A student of a teacher, whose encoder it takes; it decodes so many latent frames at once."""
    config = teacher.config
    student = AutoencoderKLMagiHumanTurbo(
        latent_channels=config.z_dim,
        decoder_block_out_channels=(16, 24, 40, 56),
        decoder_layers_per_block=(0, 1, 1, 1, 1),
        encoder_base_dim=config.base_dim,
        encoder_dim_mult=config.dim_mult,
        encoder_num_res_blocks=config.num_res_blocks,
        first_chunk_size=window,
        step_size=window,
        latents_mean=config.latents_mean,
        latents_std=config.latents_std,
    )
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    student.quant_conv.load_state_dict(teacher.quant_conv.state_dict())
    return student


def main() -> None:
    parser = make_parser(__doc__, steps=3000, batch_size=2, learning_rate=1e-3)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="datasets, of falling importance")
    parser.add_argument("--teacher", type=Path, required=True, help="output of train_video_vae.py")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose decoder goes on")
    parser.add_argument("--frames", type=int, default=25, help="of a training clip, 4 * k + 1, default: %(default)s")
    parser.add_argument("--crop", type=int, default=96, help="pixels, a multiple of 16, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and models
    datasets = [load_dataset(folder).frames for folder in arguments.data]
    teacher = AutoencoderKLWan.from_pretrained(arguments.teacher / "vae")
    torch.manual_seed(arguments.seed)
    student = make_turbo_vae(teacher)
    if arguments.start_from is not None:
        # The decoder alone: the encoder is that of this teacher.
        earlier = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.start_from / "vae")
        student.decoder.load_state_dict(earlier.decoder.state_dict())
    run = Run(arguments, {"decoder": student.decoder})
    teacher, student = teacher.to(run.device).eval(), student.to(run.device)
    projection = Projection.load(arguments.teacher / "projection.safetensors").to(run.device)

    # 2. Train
    for rng in run.steps():
        video = draw_crops(datasets, rng, arguments.batch_size, arguments.frames, arguments.crop)
        video = to_tensor(video).to(run.device)
        latents = projection.encode(video)
        with run.accelerator.autocast():
            with torch.no_grad():
                target = decode(teacher, latents).clamp(-1, 1)
            decoded = run.models["decoder"](latents, is_first_chunk=True)
        teacher_errors, true_errors = ((decoded.float() - wanted).square() for wanted in (target, video))
        run.update(
            "decoder",
            (detail_weights(video) * (2 * teacher_errors + true_errors)).mean(),
            psnr_to_teacher=-10 * torch.log10(teacher_errors.detach().mean() / 4),
            psnr=-10 * torch.log10(true_errors.detach().mean() / 4),
        )

    # 3. Save, and look: true, the teacher's, the student's
    student.eval().save_pretrained(arguments.output / "vae")
    video = to_tensor(datasets[0][:4]).to(run.device)
    with torch.no_grad():
        latents = projection.encode(video)
        videos = (video, decode(teacher, latents), student.decode(latents).sample)
    save_sheet(
        [to_frames(part)[clip, ::8] for clip in range(len(video)) for part in videos], arguments.output / "samples.png"
    )


if __name__ == "__main__":
    main()
