# SPDX-License-Identifier: Apache-2.0
"""The Turbo VAE: a light decoder for the latents of the Wan 2.2 VAE, and the encoder of that VAE, which is optional.

The decoder is not causal; it slides a window over the latent frames, so its memory does not grow with the video. Tiles
in space see as far as the convolutions do, so they fit together without blending.
"""
# ruff: noqa: ARG002 (the decoder and the pipelines read the model's arguments from its config)

import math
from collections import UserList
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d, patchify, unpatchify
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .checks import check_choice, check_integer, check_list, check_real, check_tensor
from .single_file import MagiHumanTurboSingleFileMixin
from .weights import MagiHumanWeightsMixin

# Statistics of the 48 latent channels of the Wan 2.2 VAE.
# fmt: off
LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

PATCH_SIZE = 2  # height and width of the square of pixels that is folded into channels
# Options of the original that its published configs hold, with the only value that is built here.
ORIGINAL_OPTIONS = {"decoder_causal": False, "patch_size": PATCH_SIZE, "patch_size_t": 1, "scaling_factor": 1.0}
MAX_SIZE, MAX_PARAMETERS = 2**12, 10**10  # of a config


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with Python's own numbers; `ValueError` for what is no autoencoder, or too large a one."""
    flag = (check_choice, True, False)
    names = ("in_channels", "out_channels", "latent_channels", "first_chunk_size", "step_size")
    checked = {name: check_integer(name, config[name], 1, MAX_SIZE) for name in names}
    for name in ("decoder_block_out_channels", "encoder_dim_mult"):
        checked[name] = check_list(name, config[name], range(1, 9), check_integer, 1, MAX_SIZE)
    widths, multiples = checked["decoder_block_out_channels"], checked["encoder_dim_mult"]
    checks = {
        "encoder_num_res_blocks": (check_integer, 0, 64),
        "decoder_dw_kernel_size": (check_choice, *range(1, 32, 2)),
        "use_unpatchify": flag,
        "resnet_norm_eps": (check_real, 1e-12, 1.0),
        "decoder_layers_per_block": (check_list, [len(widths) + 1], check_integer, 0, 64),
        "decoder_spatio_temporal_scaling": (check_list, [len(widths)], *flag),
        "decoder_spatio_only": (check_list, [len(widths)], *flag),
        "decoder_is_dw_conv": (check_list, [len(widths) + 1], *flag),
        "encoder_temporal_downsample": (check_list, [len(multiples) - 1], *flag),
    }
    for name, lowest in (("latents_mean", -1e6), ("latents_std", 1e-6)):  # which original configs leave out
        checks[name] = (check_list, [checked["latent_channels"], len(LATENTS_MEAN)], check_real, lowest, 1e6)
    checked |= {name: check(name, config[name], *limits) for name, (check, *limits) in checks.items()}
    num_layers = checked["decoder_layers_per_block"]
    if not config["use_unpatchify"] and widths[0] % PATCH_SIZE**2:
        raise ValueError(f"`decoder_block_out_channels[0]`={widths[0]} must be a multiple of {PATCH_SIZE**2}.")
    size = max(widths) ** 2 * (sum(num_layers) + 2 * len(widths))
    if config["encoder_base_dim"] is not None:
        checked["encoder_base_dim"] = check_integer("encoder_base_dim", config["encoder_base_dim"], 1, MAX_SIZE)
        width = checked["encoder_base_dim"] * max(multiples)
        size = max(size, width**2 * (config["encoder_num_res_blocks"] + 2) * len(multiples))
        factors = [2 ** (2 + down) for down in config["encoder_temporal_downsample"]] + [1]
        for before, after, factor in zip((1, *multiples), multiples, factors, strict=False):
            if before * factor % after:
                raise ValueError(f"`encoder_dim_mult`={multiples}: {after} must divide {before * factor}.")
    if 54 * size > MAX_PARAMETERS:  # two convolutions of 3x3x3 in a layer
        raise ValueError(f"`decoder_block_out_channels`={widths} or `encoder_base_dim` are too many for the layers.")
    return checked


def rms_norm(hidden_states: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale every position of `(batch_size, channels, ...)` to mean square 1 over its channels, in float32."""
    mean_square = hidden_states.float().pow(2).mean(dim=1, keepdim=True)
    return (hidden_states * torch.rsqrt(mean_square + eps)).to(hidden_states.dtype)


def apply_to_frames(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Run a module for images on every frame of `(batch_size, channels, num_frames, height, width)`."""
    frames = module(hidden_states.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (hidden_states.shape[0], -1)).transpose(1, 2)


def margin_and_scale(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """How many positions beyond its own an output of the modules, run in this order, sees; how often they double."""
    margin, scale = 0.0, 1
    for module in modules:
        if isinstance(module, nn.Upsample):
            scale *= 2
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            margin += (module.kernel_size[-1] - 1) / 2 / scale
    return math.ceil(margin), scale


def tile_bounds(size: int, tile_size: int) -> list[tuple[int, int]]:
    """Starts and ends of the fewest tiles of about equal size, at most `tile_size`."""
    num_tiles = math.ceil(size / tile_size)
    return [(tile * size // num_tiles, (tile + 1) * size // num_tiles) for tile in range(num_tiles)]


class MagiHumanTurboConv3d(nn.Conv3d):
    """Convolution of `(batch_size, channels, num_frames, height, width)` that repeats the outer frames in time and
    pads height and width with zeros, so that all three keep their size."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int], groups: int = 1
    ) -> None:
        frame_padding, *spatial_padding = ((size - 1) // 2 for size in kernel_size)
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, *spatial_padding), groups=groups)
        self.frame_padding = frame_padding

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.frame_padding:
            first = [hidden_states[:, :, :1]] * self.frame_padding
            last = [hidden_states[:, :, -1:]] * self.frame_padding
            hidden_states = torch.cat([*first, hidden_states, *last], dim=2)
        weight = self.weight
        if weight.device.type == "cpu":
            # oneDNN is faster with channels last, and goes by the weight. It is not stored so, as safetensors refuses.
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return self._conv_forward(hidden_states, weight, self.bias)


class MagiHumanTurboSeparableConv3d(nn.Module):
    """Depthwise convolution of `(batch_size, channels, num_frames, height, width)`, then a pointwise one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.depthwise_conv = MagiHumanTurboConv3d(in_channels, in_channels, kernel_size, groups=in_channels)
        self.pointwise_conv = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(hidden_states))


class MagiHumanTurboResnetBlock3d(nn.Module):
    """Residual block, with separable convolutions of `separable_kernel_size` or, for `None`, plain ones of 3; where
    channels change, the residual is normed and convolved too. `first_activation` follows the first norm, SiLU the
    second."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        separable_kernel_size: int | None,
        shortcut_norm_eps: float,
        first_activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        conv_class = MagiHumanTurboConv3d if separable_kernel_size is None else MagiHumanTurboSeparableConv3d
        kernel_size = (separable_kernel_size or 3,) * 3
        self.first_activation = first_activation
        self.conv1 = conv_class(in_channels, out_channels, kernel_size)
        self.conv2 = conv_class(out_channels, out_channels, kernel_size)
        self.shortcut_norm_eps = shortcut_norm_eps
        self.conv_shortcut = conv_class(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.conv1(self.first_activation(rms_norm(hidden_states)))
        hidden_states = self.conv2(F.silu(rms_norm(hidden_states)))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(rms_norm(residual, self.shortcut_norm_eps))
        return hidden_states + residual


class MagiHumanTurboUpsampler3d(nn.Module):
    """Doubles height and width and, unless `spatial_only`, the number of frames."""

    def __init__(self, channels: int, spatial_only: bool) -> None:
        super().__init__()
        self.time_conv = None if spatial_only else MagiHumanTurboConv3d(channels, 2 * channels, (3, 1, 1))
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        )

    def forward(self, hidden_states: Tensor, is_first_chunk: bool) -> Tensor:
        if self.time_conv is not None:
            # (batch_size, 2 * channels, num_frames, ...) -> (batch_size, channels, 2 * num_frames, ...)
            hidden_states = self.time_conv(hidden_states).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            if is_first_chunk:
                hidden_states = hidden_states[:, :, 1:]  # the first latent frame stands for one frame, not for two
        return apply_to_frames(self.resample, hidden_states)


class MagiHumanTurboBlock3d(nn.Module):
    """Block of the decoder: change of channels and upsampler, each where wanted, then `num_layers` residual blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        separable_kernel_size: int | None,
        shortcut_norm_eps: float,
        upsample: bool = False,
        spatial_only: bool = False,
    ) -> None:
        super().__init__()
        resnet = (separable_kernel_size, shortcut_norm_eps)
        self.conv_in = None
        if in_channels != out_channels:
            self.conv_in = MagiHumanTurboResnetBlock3d(in_channels, out_channels, *resnet)
        self.upsamplers = nn.ModuleList([MagiHumanTurboUpsampler3d(out_channels, spatial_only)] if upsample else [])
        resnet = (out_channels, out_channels, *resnet, F.relu if upsample else F.silu)
        self.resnets = nn.ModuleList(MagiHumanTurboResnetBlock3d(*resnet) for _ in range(num_layers))

    def forward(self, hidden_states: Tensor, is_first_chunk: bool) -> Tensor:
        if self.conv_in is not None:
            hidden_states = self.conv_in(hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states, is_first_chunk)
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        return hidden_states


class MagiHumanTurboDecoder3d(nn.Module):
    """Decoder of one window of latent frames, with the config of [`AutoencoderKLMagiHumanTurbo`]. It walks the tuples
    from the end, which in those with one entry more than there are blocks is the middle block's."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        channels, eps = config.decoder_block_out_channels[-1], config.resnet_norm_eps
        kernel_size = config.decoder_dw_kernel_size
        mid_kernel_size, *kernel_sizes = (kernel_size if is_dw else None for is_dw in config.decoder_is_dw_conv[::-1])
        mid_layers, *num_layers = reversed(config.decoder_layers_per_block)
        upsamples, spatial_only = config.decoder_spatio_temporal_scaling[::-1], config.decoder_spatio_only[::-1]

        self.conv_in = MagiHumanTurboConv3d(config.latent_channels, channels, (3, 3, 3))
        self.mid_block = MagiHumanTurboBlock3d(channels, channels, mid_layers, mid_kernel_size, eps)
        self.up_blocks = nn.ModuleList()
        widths = config.decoder_block_out_channels[::-1]
        blocks = zip(widths, num_layers, kernel_sizes, upsamples, spatial_only, strict=True)
        for width, layers, kernel_size, *upsampling in blocks:
            self.up_blocks.append(MagiHumanTurboBlock3d(channels, width, layers, kernel_size, eps, *upsampling))
            channels = width

        self.upsampler2d_1, out_channels = None, config.out_channels
        if config.use_unpatchify:
            out_channels = out_channels * PATCH_SIZE**2
        else:
            self.upsampler2d_1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
            channels = channels // PATCH_SIZE**2
        self.conv_out = MagiHumanTurboConv3d(channels, out_channels, (3, 3, 3))

        in_tiles = nn.ModuleList([*self.up_blocks[1:], self.upsampler2d_1 or nn.Identity(), self.conv_out])
        self.tile_margin, scale = margin_and_scale(in_tiles.modules())
        self.tile_scale = scale * PATCH_SIZE

    def forward(self, hidden_states: Tensor, is_first_chunk: bool, tile_size: tuple[int, int] | None = None) -> Tensor:
        """Decodes latents `(batch_size, latent_channels, num_frames, height, width)` to `(batch_size, out_channels,
        4 * num_frames, 16 * height, 16 * width)`, or 3 frames less if `is_first_chunk`: the first latent frame of a
        video gives one. The large end runs on tiles of `tile_size`, height and width in pixels, one by one."""
        hidden_states = self.conv_in(hidden_states)
        hidden_states = self.mid_block(hidden_states, is_first_chunk)
        hidden_states = self.up_blocks[0](hidden_states, is_first_chunk)
        if tile_size is None:
            return self._to_pixels(hidden_states, is_first_chunk)

        margin, scale = self.tile_margin, self.tile_scale
        tile_height, tile_width = (max(size // scale, 1) for size in tile_size)
        rows = []
        for top, bottom in tile_bounds(hidden_states.shape[3], tile_height):
            row = []
            for left, right in tile_bounds(hidden_states.shape[4], tile_width):
                y, x = max(top - margin, 0), max(left - margin, 0)
                tile = hidden_states[..., y : bottom + margin, x : right + margin]
                pixels = self._to_pixels(tile, is_first_chunk)[..., (top - y) * scale :, (left - x) * scale :]
                row.append(pixels[..., : (bottom - top) * scale, : (right - left) * scale])
            rows.append(torch.cat(row, dim=4))
        return torch.cat(rows, dim=3)

    def _to_pixels(self, hidden_states: Tensor, is_first_chunk: bool) -> Tensor:
        for up_block in self.up_blocks[1:]:
            hidden_states = up_block(hidden_states, is_first_chunk)
        hidden_states = F.silu(rms_norm(hidden_states))
        if self.upsampler2d_1 is None:
            return unpatchify(self.conv_out(hidden_states), PATCH_SIZE)
        hidden_states = apply_to_frames(self.upsampler2d_1, hidden_states)
        hidden_states = F.pixel_shuffle(hidden_states.transpose(1, 2), PATCH_SIZE).transpose(1, 2)
        return self.conv_out(F.silu(rms_norm(hidden_states)))


class AutoencoderKLMagiHumanTurbo(
    MagiHumanWeightsMixin, ModelMixin, AutoencoderMixin, ConfigMixin, MagiHumanTurboSingleFileMixin
):
    """The Turbo VAE of daVinci-MagiHuman ([arXiv 2603.21986](https://huggingface.co/papers/2603.21986)): `decode` is a
    light decoder for the latents of the Wan 2.2 VAE, `encode` is the encoder of the Wan 2.2 VAE.

    Tuples with one entry per block go from pixels to latents, the reverse of the order in which the decoder runs.

    Args:
        in_channels, out_channels, latent_channels (`int`): Channels of the videos to encode, decoded, and of latents.
        decoder_block_out_channels (`tuple[int, ...]`): Channels of each block.
        decoder_layers_per_block (`tuple[int, ...]`): Residual blocks of each block, and of the middle block.
        decoder_spatio_temporal_scaling (`tuple[bool, ...]`): Whether a block upsamples.
        decoder_spatio_only (`tuple[bool, ...]`): Whether a block that upsamples leaves the number of frames as it is.
        decoder_is_dw_conv (`tuple[bool, ...]`): Whether the residual blocks of each block, and of the middle block,
            have depthwise separable convolutions, of kernel size `decoder_dw_kernel_size`.
        resnet_norm_eps (`float`, defaults to 1e-6): Epsilon of the norms on the shortcuts; the others have 1e-8.
        use_unpatchify (`bool`, defaults to `True`): Whether the last convolution gives patches; if not, a convolution
            and a pixel shuffle come before it.
        first_chunk_size, step_size (`int`, defaults to 7): Latent frames of the first window, and of every other.
        encoder_base_dim (`int`, *optional*): Channels of the encoder's first layer, 160 in Wan 2.2, or no encoder.
        encoder_dim_mult (`tuple[int, ...]`): Channels of each block of the encoder, in units of `encoder_base_dim`.
        encoder_num_res_blocks (`int`, defaults to 2): Residual blocks of each block of the encoder.
        encoder_temporal_downsample (`tuple[bool, ...]`): Whether a block of the encoder halves the number of frames.
        latents_mean, latents_std (`tuple[float, ...]`): Statistics of the latent channels, applied by the pipelines.

    `spatial_compression_ratio` is pixels per latent in height and width, 16 in the published model, and
    `temporal_compression_ratio` frames per latent frame after the first, 4.
    `ValueError`: a value is out of range, or lengths disagree.
    """

    original_options = ORIGINAL_OPTIONS
    _supports_gradient_checkpointing = False
    _no_split_modules = ["MagiHumanTurboBlock3d", "WanResidualDownBlock", "WanMidBlock"]
    _group_offload_block_modules = ["encoder", "quant_conv", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 48,
        decoder_block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        decoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3),
        decoder_spatio_temporal_scaling: tuple[bool, ...] = (False, True, True, True),
        decoder_spatio_only: tuple[bool, ...] = (False, True, False, False),
        decoder_is_dw_conv: tuple[bool, ...] = (False, False, False, False, False),
        decoder_dw_kernel_size: int = 5,
        resnet_norm_eps: float = 1e-6,
        use_unpatchify: bool = True,
        first_chunk_size: int = 7,
        step_size: int = 7,
        encoder_base_dim: int | None = None,
        encoder_dim_mult: tuple[int, ...] = (1, 2, 4, 4),
        encoder_num_res_blocks: int = 2,
        encoder_temporal_downsample: tuple[bool, ...] = (False, True, True),
        latents_mean: tuple[float, ...] = LATENTS_MEAN,
        latents_std: tuple[float, ...] = LATENTS_STD,
    ) -> None:
        super().__init__()
        self.register_to_config(**check_config(self.config))
        self.encoder = self.quant_conv = None
        if encoder_base_dim is not None:
            widths = in_channels * PATCH_SIZE**2, encoder_base_dim, 2 * latent_channels, list(encoder_dim_mult)
            options = {"temperal_downsample": encoder_temporal_downsample, "is_residual": True}
            self.encoder = WanEncoder3d(*widths, num_res_blocks=encoder_num_res_blocks, **options)
            self.quant_conv = WanCausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.decoder = MagiHumanTurboDecoder3d(self.config)
        scalings = list(zip(decoder_spatio_temporal_scaling, decoder_spatio_only, strict=True))
        self.spatial_compression_ratio = PATCH_SIZE * 2 ** sum(upsample for upsample, _ in scalings)
        self.temporal_compression_ratio = 2 ** sum(upsample and not only for upsample, only in scalings)
        self.first_chunk_size, self.step_size = first_chunk_size, step_size
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_height, self.tile_sample_min_width = 544, 480  # eight tiles of 1088x1920

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        for name, value in ORIGINAL_OPTIONS.items():
            if config_dict.get(name, value) != value:
                raise ValueError(f"`{name}` must be {value}, but is {config_dict[name]} in the config.")
        # The two ratios follow from the blocks.
        ignored = {*ORIGINAL_OPTIONS, "spatial_compression_ratio", "temporal_compression_ratio"}
        config_dict = {name: value for name, value in config_dict.items() if name not in ignored}
        return super().extract_init_dict(config_dict, **kwargs)

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        """Decode in tiles, to save memory with large videos; the arguments are a tile's height and width in pixels, at
        most, 544 and 480 unless set before. `ValueError` for what is no multiple of `spatial_compression_ratio`.

        Only the end of the decoder, whose feature maps are large, runs on tiles, each with a margin as wide as its
        convolutions see. So they meet without seams: the result differs from an untiled one by rounding alone. The
        margin costs time, the more the smaller the tiles.
        """
        multiple = self.spatial_compression_ratio
        sizes = {"tile_sample_min_height": tile_sample_min_height, "tile_sample_min_width": tile_sample_min_width}
        for name, size in sizes.items():
            if size is not None and check_integer(name, size) % multiple:
                raise ValueError(f"`{name}`={size} must be a multiple of {multiple}.")
        self.use_tiling = True
        self.tile_sample_min_height = tile_sample_min_height or self.tile_sample_min_height
        self.tile_sample_min_width = tile_sample_min_width or self.tile_sample_min_width

    def _encode(self, x: Tensor) -> Tensor:
        x = patchify(x, PATCH_SIZE)
        num_convs = sum(isinstance(module, WanCausalConv3d) for module in self.encoder.modules())
        # The encoder changes both in place. The hooks of offloading would replace plain lists by copies.
        feat_cache = UserList([None] * num_convs)
        ratio = self.temporal_compression_ratio
        chunks = x.split([1] + [ratio] * (x.shape[2] // ratio), dim=2)
        encoded = [self.encoder(chunk, feat_cache=feat_cache, feat_idx=UserList([0])) for chunk in chunks]
        return self.quant_conv(torch.cat(encoded, dim=2))

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode videos `(batch_size, in_channels, 4 * k + 1, height, width)` in [-1, 1], of height and width
        multiples of 16, exactly as the Wan 2.2 VAE does, to the distribution of their latents `(batch_size,
        latent_channels, k + 1, height / 16, width / 16)`, not normalised. An image is a video of one frame;
        `ValueError` for other numbers of frames."""
        if self.encoder is None:
            raise ValueError("This model has no encoder: load one along, `load_original_turbo_vae(encoder=...)`.")
        check_tensor("x", x, (None, self.config.in_channels, None, None, None), has_data=False)
        ratio, multiple = self.temporal_compression_ratio, self.spatial_compression_ratio
        if (x.shape[2] - 1) % ratio or x.shape[3] % multiple or x.shape[4] % multiple:
            allowed = f"height and width multiples of {multiple} and {ratio} * k + 1 frames"
            raise ValueError(f"`x` must have {allowed}, but has shape {tuple(x.shape)}.")
        x = x.to(self.dtype)
        samples = x.split(1) if self.use_slicing else [x]
        posterior = DiagonalGaussianDistribution(torch.cat([self._encode(sample) for sample in samples]))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode_windows(self, z: Tensor) -> Iterator[Tensor]:
        """Decode one window of latent frames after the other, so that only one of them is in memory at a time: parts
        of what [`~AutoencoderKLMagiHumanTurbo.decode`] gives for the same latents, to be joined along dimension 2.

        Each window but the outermost sees one latent frame more on either side, whose frames are cut off again. The
        last latent frame is repeated until the last window is full.
        """
        check_tensor("z", z, (None, self.config.latent_channels, None, None, None), has_data=False)
        return self._decode_windows(z.to(self.dtype))

    def _decode_windows(self, z: Tensor) -> Iterator[Tensor]:
        num_missing = self.first_chunk_size - z.shape[2]
        num_padding = num_missing if num_missing > 0 else num_missing % self.step_size
        z = torch.cat([z, z[:, :, -1:].expand(-1, -1, num_padding, -1, -1)], dim=2)

        tiling = {"tile_size": (self.tile_sample_min_height, self.tile_sample_min_width)} if self.use_tiling else {}
        ratio = self.temporal_compression_ratio
        ends = range(self.first_chunk_size, z.shape[2] + 1, self.step_size)
        for start, end in zip([0, *ends], ends, strict=False):
            is_first, is_last = start == 0, end == z.shape[2]
            num_before, num_after = int(not is_first), int(not is_last)
            window = z[:, :, start - num_before : end + num_after]
            frames = self._decode_window(window, is_first_chunk=is_first, **tiling)
            num_cut = num_padding if is_last else num_after
            yield frames[:, :, num_before * ratio : frames.shape[2] - num_cut * ratio]

    @apply_forward_hook  # for each window, as another call may have offloaded the model since the last one
    def _decode_window(self, window: Tensor, **options: Any) -> Tensor:
        samples = window.split(1) if self.use_slicing else [window]
        return torch.cat([self.decoder(sample, **options) for sample in samples])

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents `(batch_size, latent_channels, num_frames, height, width)`, not normalised: of what a
        transformer gives, `z * latents_std + latents_mean`. Videos come as `(batch_size, out_channels,
        4 * num_frames - 3, 16 * height, 16 * width)`, about in [-1, 1] but not clamped, and are decoded in tiles after
        [`~AutoencoderKLMagiHumanTurbo.enable_tiling`]."""
        decoded = torch.cat(list(self.decode_windows(z)), dim=2)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode videos, draw latents by `generator` or take the mode of their distribution, and decode them again."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)
