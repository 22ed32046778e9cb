# SPDX-License-Identifier: Apache-2.0
"""Calculate what one eager forward of the published transformer costs a GPU at least, kernel by kernel.

    python benchmarks/roofline.py 256p|540p|1080p [--fuse] [--chunk]

The model runs on the meta device, so this needs neither weights nor a GPU and gives the same figures everywhere. Every
operation is charged the longer of FLOP / rate and bytes / bandwidth, and a launch; views are free. So eager code would
be this fast if each kernel were perfect, and what neither multiplies matrices nor attends is what fusing could save.
The last line of stdout is JSON.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import print_result
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.conversion import variant_config
from diffusers_magihuman.tools.plan import make_meta_model

# Of an H100. Products of float32 without tf32; attention as FlashAttention 3 reaches it for heads of 128 channels.
RATES, ATTENTION_RATE = {torch.bfloat16: 790e12, torch.float32: 50e12}, 550e12
BANDWIDTH, LAUNCH = 2.7e12, 3e-6
# fmt: off
VIEWS = (
    "view", "reshape", "permute", "transpose", "expand", "slice", "split", "unbind", "select", "alias", "detach", "t",
    "squeeze", "unsqueeze", "as_strided", "narrow", "unflatten", "chunk", "_unsafe_view", "split_with_sizes",
    "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "unfold",
)
# fmt: on
# The variant, and rows and columns of its latents.
SIZES = {"256p": ("base", 16, 28), "540p": ("sr-540p", 32, 58), "1080p": ("sr-1080p", 68, 120)}
NUM_FRAMES, AUDIO_LENGTH, TEXT_LENGTH = 32, 126, 400


@dataclass
class Cost:
    """Of all calls of one kernel."""

    count: int = 0
    flop: float = 0.0
    num_bytes: float = 0.0
    seconds: float = 0.0


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Roofline(TorchDispatchMode):
    """Charges every operation in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)

    def charge(self, name: str, flop: float, moved: float, rate: float) -> None:
        cost = self.costs[name]
        cost.count += 1
        cost.flop += flop
        cost.num_bytes += moved
        cost.seconds += max(flop / rate, moved / BANDWIDTH) + LAUNCH

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output, operator = func(*args, **kwargs), func.overloadpacket
        name = operator.__name__
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if name in VIEWS or not outputs:
            return output
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # An expanded tensor is read from a cache.
        moved = sum(num_bytes(tensor) for tensor in inputs if 0 not in tensor.stride() or tensor.numel() < 2)
        moved += sum(map(num_bytes, outputs))
        flop = flop_registry[operator](*args, **kwargs, out_val=output) if operator in flop_registry else 0
        rate = ATTENTION_RATE if "attention" in name else RATES.get(outputs[0].dtype, 50e12)
        self.charge(name, flop, moved, rate)
        return output


class WholeKernels(TorchFunctionMode):
    """Charges as one kernel what is one on a GPU, but many operations on the meta device: attention and RMSNorm."""

    def __init__(self, roofline: Roofline) -> None:
        super().__init__()
        self.charge = roofline.charge

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.rms_norm:
            output = torch.empty_like(args[0])
            self.charge("rms_norm", 0, 2 * num_bytes(output), 1)
            return output
        return func(*args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, *_: Any, **__: Any) -> Tensor:
        flop = 4 * query.numel() * key.shape[2]
        self.charge("attention", flop, 2 * (num_bytes(query) + num_bytes(key)), ATTENTION_RATE)
        return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.no_grad()
def run(size: str, fuse: bool = False, chunk: bool = False) -> dict[str, Cost]:
    """The cost of each kernel of one forward of the published model for that size, in bfloat16."""
    variant, *shape = SIZES[size]
    config = variant_config(variant, num_layers=40)
    model = make_meta_model(lambda: MagiHumanTransformer3DModel(**config), torch.bfloat16)
    if fuse:
        model.fuse_qkv_projections()
    if chunk:
        model.enable_forward_chunking()
    shapes = (1, 48, NUM_FRAMES, *shape), (1, AUDIO_LENGTH, 64), (1, TEXT_LENGTH, 3584)
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    with Roofline() as roofline, WholeKernels(roofline):
        model(*inputs)
    return roofline.costs


def summarise(costs: dict[str, Cost]) -> dict[str, float]:
    """Milliseconds, the share of them in matrix products and attention, what is moved in GB, and calls of kernels."""
    seconds = sum(cost.seconds for cost in costs.values())
    heavy = sum(cost.seconds for cost in costs.values() if cost.flop)
    return {
        "ms": round(1e3 * seconds, 1),
        "matmul_and_attention_ms": round(1e3 * heavy, 1),
        "share": round(heavy / seconds, 4),
        "tflop": round(sum(cost.flop for cost in costs.values()) / 1e12, 1),
        "gb": round(sum(cost.num_bytes for cost in costs.values()) / 1e9, 1),
        "cat_gb": round(costs["cat"].num_bytes / 1e9, 1),
        "kernels": sum(cost.count for cost in costs.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--fuse", action="store_true", help="query, key and value are one linear")
    parser.add_argument("--chunk", action="store_true", help="the feed-forward takes 4096 tokens at a time")
    arguments = parser.parse_args()
    costs = run(**vars(arguments))
    for name, cost in sorted(costs.items(), key=lambda item: -item[1].seconds)[:14]:
        print(
            f"{name:20} x{cost.count:5} {cost.flop / 1e12:8.2f} TFLOP {cost.num_bytes / 1e9:8.2f} GB"
            f" {1e3 * cost.seconds:8.2f} ms"
        )
    print_result("roofline", torch.device("meta"), **vars(arguments), **summarise(costs))


if __name__ == "__main__":
    main()
