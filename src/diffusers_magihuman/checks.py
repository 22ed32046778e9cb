# SPDX-License-Identifier: Apache-2.0
"""What every argument that is a number, a tensor or one of a few choices must be: checked here, and nowhere else."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

Dims = Sequence[int | None] | None
INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights


class Short(reprlib.Repr):
    """Values in errors, also at depth: of arrays the kind alone; Python writes no integer of above 4300 digits."""

    def repr1(self, x: Any, level: int) -> str:
        if not isinstance(x, np.ndarray | Tensor):
            return super().repr1(x, level)
        shape = "nested" if getattr(x, "is_nested", False) else f"shape {tuple(x.shape)} and"
        return f"{type(x).__name__} of {shape} {x.dtype}"

    def repr_int(self, x: int, level: int) -> str:
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 400 else super().repr_int(x, level)


SHORT = Short()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 2, 120, 120, 120
show = SHORT.repr  # a value as errors name it


def show_some(names: Iterable[Any], count: int = 8) -> str:
    """The first few of names, of which a checkpoint has thousands, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def check_integer(name: str, value: Any, low: int = 1, high: int = 2**31 - 1) -> int:
    """Returns an integer within the limits, one of numpy too, but no boolean; `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise ValueError(f"`{name}`={show(value)} must be an integer in {low} to {high}.")
    return int(value)


def check_real(name: str, value: Any, low: float = -1e9, high: float = 1e9) -> float:
    """Returns an integer or float, one of numpy too, within the limits, which neither NaN nor a boolean is;
    `ValueError` for anything else, also for fractions, which tensors do not take."""
    if isinstance(value, bool) or not isinstance(value, Integral | float | np.floating) or not low <= value <= high:
        raise ValueError(f"`{name}`={show(value)} must be a number in {low:g} to {high:g}.")
    return float(value)


def check_choice(name: str, value: Any, *allowed: Any) -> Any:
    """Returns one of a few values, also of their type, or numpy's of it: neither 1 nor "true" is `True`."""
    value = value.item() if isinstance(value, np.generic) else value
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"`{name}`={show(value)} must be {' or '.join(map(repr, allowed))}.")
    return value


def check_list(name: str, value: Any, lengths: Sequence[int] | None, check: Callable, *limits: Any) -> Any:
    """Returns a list or tuple, of one of the lengths if they are given, of what a check returns of its items."""
    if not isinstance(value, list | tuple) or (lengths and len(value) not in lengths):
        allowed = " or ".join(map(str, lengths or ("any number of",)))
        raise ValueError(f"`{name}`={show(value)} must be a list or tuple of {allowed} entries.")
    items = [check(f"{name}[{index}]", item, *limits) for index, item in enumerate(value)]
    return items if isinstance(value, list) else tuple(items)


def check_tensor(
    name: str, value: Any, shape: Dims, has_data: bool = True, low: float = -INF, high: float = INF, mask: bool = False
) -> None:
    """A dense floating tensor, as a mask also one of integers or booleans, of the shape, where `None` allows any, or
    any size, but 0. Unless `has_data` is false, as for what models are called with, its values must be there, finite
    and within the limits."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if not is_dense or value.is_complex() or (value.itemsize < 2 if value.is_floating_point() else not mask):
        allowed = "a floating dtype, not of float8" if not mask else "booleans or real numbers"
        raise ValueError(f"`{name}`={show(value)} must be a dense tensor of {allowed}.")
    shape = value.shape if shape is None else shape
    allowed = [size if needed is None else needed for size, needed in zip(value.shape, shape, strict=False)]
    if 0 in value.shape or value.ndim != len(shape) or list(value.shape) != allowed:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but must have shape ({sizes}), no size 0.")
    if has_data and value.is_meta:
        raise ValueError(f"`{name}` holds no data.")
    has_limits = low > -INF or high < INF
    if not has_data or not (has_limits or value.is_floating_point()):
        return
    is_finite = torch.isfinite(value)
    # Python waits for a device where it asks what is there, so it asks once.
    if not (is_finite & (value >= low) & (value <= high) if has_limits else is_finite).all():
        if not is_finite.all():
            raise ValueError(f"`{name}` holds NaN or infinite values.")
        raise ValueError(f"`{name}` must be in {low:g} to {high:g}, but is in {value.min():g} to {value.max():g}.")


def check_same_shapes(has_data: bool = True, **tensors: Tensor) -> None:
    """Dense floating tensors, see [`check_tensor`], of the shape of the first."""
    first = next(iter(tensors))
    for name, value in tensors.items():
        check_tensor(name, value, None, has_data)
        if (shape := tuple(value.shape)) != (needed := tuple(tensors[first].shape)):
            raise ValueError(f"`{name}` has shape {shape}, but must have shape {needed}, that of `{first}`.")


def check_mask(name: str, value: Any, shape: Dims, has_data: bool = True) -> None:
    """A tensor of the shape that is true or 1 where something counts, at least once in each row, and else 0."""
    check_tensor(name, value, shape, has_data, mask=True)
    if has_data and not (((value == 0) | (value == 1)).all() & (value == 1).any(dim=-1).all()):
        raise ValueError(f"`{name}` must be true or 1, or else 0, and true at least once in each row.")


def check_dtype(name: str, value: Any, default: torch.dtype = torch.bfloat16) -> torch.dtype:
    """One of `DTYPES`, or its name with or without `torch.`; the default for `None`; `ValueError` for the rest."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if isinstance(value, str):
        value = names.get(value.removeprefix("torch."), value)
    if value is not None and not (isinstance(value, torch.dtype) and value in DTYPES):
        raise ValueError(f"`{name}`={show(value)} must be {' or '.join(names)}, by torch or by name.")
    return default if value is None else value


def check_options(function: str, options: Iterable[str], allowed: Iterable[str]) -> None:
    """`TypeError` of the function for an option that it does not know, whether or not it would have come to use it."""
    if wrong := sorted(set(options) - set(allowed)):
        raise TypeError(f"{function}() got an unexpected keyword argument {wrong[0]!r}; it also takes {[*allowed]}.")
