"""Tiny checkpoints in every published layout, made from golden weights: names, dtypes and folders as on the Hub."""

import copy
import json
import re

import torch
from golden import load_golden_weights
from make_tiny_pipeline import make_audio_vae, make_text_encoder, make_turbo_vae, make_wan_vae
from safetensors.torch import save_file
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.checkpoints import (
    convert_transformer_state_dict,
    transformer_config_from_state_dict,
    turbo_vae_rules,
)


def is_linear(name):
    return bool(re.search(r"linear_qkv|linear_proj|up_gate_proj|down_proj", name))


def mixed(weights):
    """The base: linears of the blocks in bfloat16, the rest in float32."""
    return weights


def all_fp32(weights):
    return {name: tensor.float() for name, tensor in weights.items()}


def all_bf16(weights):
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def split(weights):
    """Every linear of every modality under a name of its own."""
    result = {}
    for name, tensor in all_bf16(weights).items():
        if not is_linear(name):
            result[name] = tensor
            continue
        layer = name.split(".")[2]
        hidden_size = weights["final_norm_video.weight"].shape[0]
        num_experts = weights[f"block.layers.{layer}.mlp.pre_norm.weight"].shape[0] // hidden_size
        suffixes = ["_video", "_audio", "_text"] if num_experts == 3 else [""]
        stem = name.removesuffix(".weight")
        for suffix, expert in zip(suffixes, tensor.chunk(num_experts), strict=True):
            if "linear_qkv" in name:
                for part, rows in zip("qkvg", expert.split([64, 32, 32, 4]), strict=True):
                    result[f"{stem.replace('linear_qkv', f'linear_{part}')}{suffix}.weight"] = rows.contiguous()
            else:
                result[f"{stem}{suffix}.weight"] = expert.contiguous()
    return result


def fp8(weights):
    """One scale for each stacked tensor of the blocks' linears, everything else in bfloat16."""
    result = {}
    for name, tensor in weights.items():
        if is_linear(name):
            scale = tensor.float().abs().max() / 448
            result[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            result[f"{name}.__fp8_scale"] = scale
        else:
            result[name] = tensor.bfloat16()
    return result


FLOAT8_SCALES = {  # how other tools name a scale, and its shape for a tensor
    ".scale_weight": lambda _: (),
    ".weight_scale": lambda _: (1,),
    ".weight_scale_inv": lambda shape: tuple(-(-size // 128) for size in shape),
    ".weight.scale": lambda shape: shape[:1],
    ".weight._scale": lambda shape: (shape[0], 1),
    ".scale": lambda _: (1, 1),
}


def float8(weights, spelling, dtype=torch.float8_e4m3fn):
    """Float8 as other tools write it, and the float32 that it stands for; `None` is a cast without a scale."""
    result, expected = {}, all_fp32(weights)
    for name, tensor in expected.items():
        if not name.endswith(".weight") or not (is_linear(name) or "lora" in name):
            result[name] = tensor
            continue
        if spelling is None:
            result[name], scale = tensor.to(dtype), torch.ones(())
        else:
            scale = 0.01 + torch.rand(FLOAT8_SCALES[spelling](tensor.shape))
            stem = name.removesuffix(".weight")
            result |= {stem + spelling: scale, f"{stem}.scale_input": torch.ones(()), "scaled_fp8": torch.zeros(2)}
            if scale.ndim == 1 and len(scale) > 1:
                scale = scale[:, None]
            elif spelling == ".weight_scale_inv":
                scale = scale.repeat_interleave(128, 0)[: len(tensor)].repeat_interleave(128, 1)[:, : tensor.shape[1]]
            result[name] = (tensor / scale).clamp(-400, 400).to(dtype)
        expected[name] = result[name].float() * scale
    return result, expected


def dequantised(weights):
    """What the float8 layout stands for, under canonical names."""
    return {
        name: tensor.float() * weights.get(f"{name}.__fp8_scale", torch.tensor(1.0))
        for name, tensor in weights.items()
        if not name.endswith("__fp8_scale")
    }


def write_shards(weights, folder, stem, num_shards=3):
    folder.mkdir(parents=True)
    names = sorted(weights)
    weight_map = {}
    for number in range(num_shards):
        file = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        shard = {name: weights[name].contiguous() for name in names[number::num_shards]}
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_file(weights, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


def write_repositories(root):
    """The repositories of CHECKPOINTS, as folders `owner/name`, with the golden weights of the base and of SR."""
    base, sr = load_golden_weights("dit_base"), load_golden_weights("dit_sr")
    gair = root / "GAIR" / "daVinci-MagiHuman"
    write_shards(mixed(base), gair / "base", "model")
    write_shards(all_fp32(base), gair / "distill", "model")
    write_shards(all_fp32(sr), gair / "540p_sr", "model")
    write_shards(all_fp32(sr), gair / "1080p_sr", "model")
    (gair / "config.json").write_text("")

    fastvideo = root / "FastVideo" / "MagiHuman-Diffusers"
    for name, weights in (("base", base), ("distill", base), ("sr_540p", base), ("sr_1080p", base)):
        write_shards(mixed(weights), fastvideo / name / "transformer", "diffusion_pytorch_model")
        config = {"_class_name": "MagiHumanDiT", "local_attn_layers": []}
        (fastvideo / name / "transformer" / "config.json").write_text(json.dumps(config))
        (fastvideo / name / "model_index.json").write_text(json.dumps({"_class_name": "MagiHumanPipeline"}))
    for name in ("sr_540p", "sr_1080p"):
        write_shards(mixed(sr), fastvideo / name / "sr_transformer", "diffusion_pytorch_model")

    write_shards(fp8(base), root / "SanDiegoDude" / "daVinci-MagiHuman-FP8" / "distill_fp8", "model")
    write_file(split(base), root / "DeepBeepMeep" / "MagiHuman" / "magi_human_distill_bf16.safetensors")
    write_file(split(sr), root / "DeepBeepMeep" / "MagiHuman" / "magi_human_sr1080_bf16.safetensors")
    write_file(all_bf16(base), root / "smthem" / "MagiHuman" / "distill-merger_bf16.safetensors")
    write_file(all_bf16(sr), root / "smthem" / "MagiHuman" / "540p_sr_merge_bf16.safetensors")


def write_turbo_vae(weights, config, folder, prefix="module.decoder."):
    """The pickle and the json beside it, which also has keys of its training."""
    folder.mkdir(parents=True)
    state_dict = {prefix + name.removeprefix("decoder."): tensor for name, tensor in weights.items()}
    torch.save({"ema_state_dict": state_dict, "step": 340000}, folder / "checkpoint-340000.ckpt")
    training = {"aligned_feature_projection_mode": "conv", "aligned_blks_indices": [1]}
    (folder / "TurboV3-Wan22-TinyShallow_7_7.json").write_text(json.dumps({**config, **training}))


def write_external_repositories(root):
    """T5Gemma with its decoder in a shard of its own, and the autoencoders, in the folders of their repositories."""
    tokenizer, encoder = make_text_encoder(hidden_size=24)
    folder = root / "google" / "t5gemma-9b-9b-ul2"
    module = encoder.config.encoder
    config = T5GemmaConfig(encoder=module, decoder=copy.deepcopy(module), vocab_size=module.vocab_size)
    model = T5GemmaForConditionalGeneration(config)
    model.model.encoder.load_state_dict(encoder.encoder.state_dict())
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight_map = {}
    for number, part in enumerate(("encoder", "decoder"), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        shard = {name: tensor for name, tensor in state_dict.items() if name.startswith(f"model.{part}.")}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    make_audio_vae().save_pretrained(root / "stabilityai" / "stable-audio-open-1.0" / "vae")
    wan = make_wan_vae(z_dim=4)
    wan.save_pretrained(root / "Wan-AI" / "Wan2.2-TI2V-5B-Diffusers" / "vae")
    turbo = make_turbo_vae(latent_channels=4, encoder_base_dim=None)
    state_dict, rules = turbo.state_dict(), turbo_vae_rules(turbo)
    weights = {source: state_dict[next(iter(rule.targets))] for source, rule in rules.items()}
    keys = ("latent_channels", "decoder_block_out_channels", "decoder_layers_per_block")
    config = {name: turbo.config[name] for name in keys}
    write_turbo_vae(weights, config, root / "GAIR" / "daVinci-MagiHuman" / "turbo_vae")


def outputs(model, golden, text_length):
    with torch.no_grad():
        return model(
            golden["in.video_latent"], golden["in.audio_latent"], golden["in.text"][:, :text_length], return_dict=False
        )


def expected_model(weights, **config):
    """A float32 model of canonical weights, converted without any file."""
    config = transformer_config_from_state_dict(weights) | config
    model = MagiHumanTransformer3DModel(**config).eval()
    model.load_state_dict(convert_transformer_state_dict(weights, config))
    return model
