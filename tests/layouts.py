"""Tiny checkpoints in every published layout, made from golden weights: names, dtypes and folders as on the Hub."""

import json
import re

import torch
from conftest import load_golden_weights
from safetensors.torch import save_file


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
