"""The benchmarks run: at full size without data, and at tiny size on the CPU."""

import json
import signal
import time

import gpu
import pytest
import roofline
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from original_block import make_pair, original_block, sort_by_modality

from diffusers_magihuman.transformer_magihuman import SequenceLayout

TINY = {"in_channels": 4, "audio_in_channels": 8, "text_in_channels": 24, "num_attention_heads": 4}
TINY |= {
    "num_key_value_heads": 2,
    "attention_head_dim": 16,
    "local_attention_frames": 1,
    "modality_layers": (),
    "gelu_layers": (),
}
KINDS = {
    "shared": {},
    "sandwich": {"modality_layers": (0,), "gelu_layers": (0,), "post_norm_layers": (0,)},
    "local": {"local_attention_layers": (0,), "coordinate_style": "v1"},
    "local sandwich": {
        "modality_layers": (0,),
        "gelu_layers": (0,),
        "local_attention_layers": (0,),
        "local_attention_frames": 2,
    },
    "without gate": {"gated_attention": False},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_originals_block_gives_what_ours_does(kind):
    device, layout = torch.device("cpu"), SequenceLayout(5, 2, 3, 9, 7)
    model, weights = make_pair(TINY | KINDS[kind], device, torch.float32)
    hidden_states = 3 * torch.randn(1, sum(layout.modality_lengths), 64)
    rotary_emb = model.rope(layout, None, device)
    expected = model.transformer_blocks[0](hidden_states, rotary_emb, layout, None, torch.float32)[0]
    shuffled = torch.cat([part[torch.randperm(len(part))] for part in torch.arange(46).split(layout.modality_lengths)])
    for order in (sort_by_modality(layout, device), shuffled):
        output = original_block(weights, model.config, hidden_states[0, order], rotary_emb, layout, order)
        torch.testing.assert_close(output, expected[order], atol=1e-5, rtol=1e-6)


# PyTorch has no such kernels for a CPU.
GPU_BACKENDS = ("_native_cudnn", "_native_efficient")
NOT_TIMED = ("card", "ceilings", "linear", "attention", "block")


@pytest.fixture
def run_gpu(capsys):
    """The lines of `benchmarks/gpu.py` by case; what it sets for the process is restored."""
    (backend, _), handler = _AttentionBackendRegistry.get_active_backend(), signal.getsignal(signal.SIGALRM)

    def run(*arguments):
        gpu.main(list(arguments))
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        return {line.pop("case"): line for line in lines}

    yield run
    _AttentionBackendRegistry.set_active_backend(backend)
    signal.signal(signal.SIGALRM, handler)


def check_lines(lines, timed):
    """Every case gave figures, and what has a time was timed or is null."""
    failed = {name for name, line in lines.items() if "error" in line or "skipped" in line}
    assert failed == {name for name in lines if timed and name.endswith(GPU_BACKENDS)}, lines
    for name in lines.keys() - failed:
        times = [value for key, value in lines[name].items() if key in ("s", "ms", "original_ms", "first_s", "in_ms")]
        assert all(value > 0 if timed else value is None for value in times)
        assert times or name in NOT_TIMED
        least = [value for key, value in lines[name].items() if key.startswith("roofline")]
        assert all(value >= 0 for value in least) and (least or not name.startswith(("forward", "call", "decode")))


@pytest.mark.slow
def test_every_case_runs_at_tiny_size(run_gpu):
    lines = run_gpu("--device", "cpu", "--tiny", "--compiler", "none")
    check_lines(lines, timed=True)
    assert all(lines[name]["difference"] < 0.01 for name in lines if name.startswith("block"))
    assert lines["forward 256p float8 unpadded"]["quantized"] == "Float8WeightOnlyConfig, 64 of 64 linears"

    # What can be run without data in a second; with the same keys.
    planned = run_gpu("--dry-run", "card", "ceilings", "linear", "attention", "block")
    check_lines(planned, timed=False)
    assert all(planned[name].keys() == line.keys() for name, line in lines.items() if name in planned and "ms" in line)
    assert planned["attention 1080p native"]["tokens"] == 65806


@pytest.mark.slow
def test_every_case_runs_without_data(run_gpu):
    lines = run_gpu("--dry-run")
    check_lines(lines, timed=False)
    assert len(lines) == len(list(gpu.make_cases(gpu.BACKENDS)))
    for name, case in (("256p", "forward 256p eager"), ("1080p", "call 1080p eager")):
        figure = lines[case].get("roofline_ms", 1e3 * lines[case].get("roofline_s", 0))
        assert figure == pytest.approx(roofline.summarise(roofline.run(name, fuse=True))["ms"], abs=1)
    # Two steps of 15 billion parameters in bfloat16.
    assert 30 < lines["forward 256p eager"]["planned_gib"] < lines["decode 1080p"]["planned_gib"] < 80


@pytest.mark.slow
def test_what_is_compiled_is_traced_at_tiny_size(run_gpu):
    lines = run_gpu("--device", "cpu", "--tiny", "--compiler", "eager", "compiled", "graphs", "float8")
    check_lines(lines, timed=True)
    assert all(line["compile"] for line in lines.values() if "compile" in line)


def test_run_ends_with_its_minutes(run_gpu):
    lines = run_gpu("--device", "cpu", "--tiny", "--minutes", "0")
    assert all(line["skipped"].endswith("0 are left") for line in lines.values())
    signal.signal(signal.SIGALRM, gpu.stop)
    bench = gpu.Bench(torch.device("cpu"), True, "none", time.perf_counter() + 0.1, ["native"])
    start = time.perf_counter()
    assert gpu.run_case(bench, 0, lambda _: time.sleep(5)) == {"error": "TimeoutError: the minutes are over"}
    assert time.perf_counter() - start < 2
    bench.deadline += 60
    bench.release = lambda: 1 / 0  # as on a GPU that has failed for good
    assert gpu.run_case(bench, 0, lambda _: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "foo"], "--device foo is no device here"),
        (["--device", "cpu", "--minutes", "nan"], "--minutes nan must be in 0 to 1440"),
        (["--dry-run", "card", "nonsense"], "no case has 'nonsense' in its name"),
    ],
)
def test_bad_arguments_are_an_error_in_a_line(arguments, message, run_gpu, capsys):
    with pytest.raises(SystemExit):
        run_gpu(*arguments)
    assert message in capsys.readouterr().err
