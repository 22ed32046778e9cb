"""What the checks say and return; that each argument is checked is in test_arguments.py."""

import numpy as np
import pytest
import torch

from diffusers_magihuman.checks import check_choice, check_dtype, check_mask, check_tensor, show


@pytest.mark.parametrize(
    "value, shown",
    [
        ((torch.ones(3, 3),), "(Tensor of shape (3, 3) and torch.float32,)"),
        ({"a": np.ones(3)}, "{'a': ndarray of shape (3,) and float64}"),
        (torch.nn.Parameter(torch.ones(2)), "Parameter of shape (2,) and torch.float32"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "NestedTensor of nested torch.float32"),
        ([10**5000], "[an integer of 16610 bits]"),
    ],
)
def test_values_are_shown_on_one_line(value, shown):
    assert show(value) == shown


@pytest.mark.parametrize("value", [np.ones(3), torch.ones(2, 2), [torch.float32], "int8", torch.int8])
def test_what_is_no_dtype_is_refused(value):
    with pytest.raises(ValueError, match=r"`dtype`=.* must be float32 or"):
        check_dtype("dtype", value)


def test_choices_of_numpy_are_taken():
    assert check_choice("flag", np.True_, True, False) is True
    assert type(check_choice("kind", np.str_("latent"), "np", "latent")) is str
    for wrong in (np.int64(1), 1, "True", np.ones(1, bool)):
        with pytest.raises(ValueError, match=r"`flag`=.* must be True or False"):
            check_choice("flag", wrong, True, False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_are_binary_and_true_somewhere(dtype):
    mask = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    check_mask("mask", mask, (2, 2))
    wrong = [mask * 0] if dtype == torch.bool else [mask * 0, mask * 2, -mask]
    for value in wrong:
        with pytest.raises(ValueError, match="`mask` must be true or 1"):
            check_mask("mask", value.to(dtype), (2, 2))
    with pytest.raises(ValueError, match="`mask` holds no data"):
        check_mask("mask", mask.to("meta"), (2, 2))


@pytest.mark.parametrize("value, message", [(float("inf"), "holds NaN or"), (3.0, "must be in 0 to 2, but")])
def test_limits_of_tensors(value, message):
    with pytest.raises(ValueError, match=f"`x` {message}"):
        check_tensor("x", torch.tensor([1.0, value]), [2], low=0, high=2)
