"""What one forward of the published transformer moves and computes, on paper: copies that come back are seen here."""

import json
import sys

import pytest
import roofline
import torch


def test_operations_are_charged_by_bytes_and_flop():
    with roofline.Roofline() as costs, roofline.WholeKernels(costs):
        states = torch.empty(6, 4, device="meta", dtype=torch.bfloat16)
        _ = states.T @ states.expand(1, 6, 4)[0]
        states.float().add_(1.0)
        query, key = torch.empty(2, 3, 4, 5, 8, device="meta").unbind()
        torch.nn.functional.scaled_dot_product_attention(query=query, key=key[:, :2], value=key[:, :2])
    charged = {name: (cost.count, cost.flop, cost.num_bytes) for name, cost in costs.costs.items()}
    assert charged == {
        "mm": (1, 2 * 4 * 6 * 4, 2 * (24 + 24 + 16)),
        "_to_copy": (1, 0, 24 * 2 + 24 * 4),
        "add_": (1, 0, 2 * 24 * 4),
        "attention": (1, 4 * 480 * 5, 2 * 4 * (480 + 240)),
    }
    seconds = [cost.seconds for cost in costs.costs.values()]
    assert seconds[0] == pytest.approx(max(192 / 790e12, 128 / 2.7e12) + 3e-6)


@pytest.mark.parametrize("size, least_share, most_cat_gb", [("256p", 0.64, 5), ("1080p", 0.83, 120)])
def test_products_and_attention_take_most_of_the_time(size, least_share, most_cat_gb, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline.py", size, "--fuse"])
    roofline.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert least_share < figures["share"] < 0.9
    assert figures["cat_gb"] < most_cat_gb
