import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from golden import load_golden
from helpers import count_reads

from diffusers_magihuman import MagiHumanFlowScheduler


def velocity(sample):
    """The model of the golden trajectories."""
    return 0.3 * sample + torch.sin(sample)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 32])
def test_golden_unipc_trajectory(num_steps):
    _, golden = load_golden("scheduler_unipc")
    scheduler = MagiHumanFlowScheduler()
    scheduler.set_timesteps(num_steps)
    assert torch.equal(scheduler.timesteps, golden[f"n{num_steps}.timesteps"])
    assert torch.equal(scheduler.sigmas, golden[f"n{num_steps}.sigmas"])
    sample = golden["in.x0"]
    for timestep, expected in zip(scheduler.timesteps, golden[f"n{num_steps}.trajectory"], strict=True):
        sample = scheduler.step(velocity(sample), timestep, sample).prev_sample
        assert torch.equal(sample, expected)


@pytest.mark.parametrize("num_steps", [4, 8])
def test_golden_renoise_trajectory(num_steps):
    _, golden = load_golden("scheduler_unipc")
    scheduler = MagiHumanFlowScheduler(sampler="renoise")
    scheduler.set_timesteps(num_steps)
    sample = golden["in.x0"]
    trajectory, noises = golden[f"n{num_steps}.ddim.trajectory"], golden[f"n{num_steps}.ddim.noise"]
    for timestep, noise, expected in zip(scheduler.timesteps, noises, trajectory, strict=True):
        sample = scheduler.step(velocity(sample), timestep, sample, variance_noise=noise, return_dict=False)[0]
        torch.testing.assert_close(sample, expected, atol=1e-6, rtol=0)


def test_renoise_draws_from_the_generator_in_every_step():
    scheduler = MagiHumanFlowScheduler(sampler="renoise")
    scheduler.set_timesteps(2)
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    sample = torch.randn(1, 2, 3)
    for timestep in scheduler.timesteps:
        noise = torch.randn(1, 2, 3, generator=twin)
        sigma, sigma_next = scheduler.sigmas[scheduler.step_index or 0 :][:2]
        expected = sigma_next * noise + (1 - sigma_next) * (sample - sigma * velocity(sample))
        sample = scheduler.step(velocity(sample), timestep, sample, generator=generator).prev_sample
        torch.testing.assert_close(sample, expected)
    assert torch.equal(generator.get_state(), twin.get_state())  # the last step draws too


def test_custom_sigmas_are_shifted():
    scheduler = MagiHumanFlowScheduler(flow_shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.5])
    expected = [3 * sigma / (1 + 2 * sigma) for sigma in (0.9, 0.5)]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*expected, 0.0]))
    assert scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in expected]


def test_noise_of_training_is_the_flow():
    scheduler = MagiHumanFlowScheduler()
    assert len(scheduler.timesteps) == len(scheduler) == 1000
    samples, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    timesteps = scheduler.timesteps[[100, 600, 950]]
    sigma = scheduler.sigmas[[100, 600, 950]].view(3, 1, 1)
    expected = (1 - sigma) * samples + sigma * noise
    # Truncated timesteps can stand for two neighbouring noise levels, which differ by less than a step.
    torch.testing.assert_close(scheduler.add_noise(samples, noise, timesteps), expected, atol=5e-3, rtol=0)
    assert torch.equal(
        scheduler.scale_noise(samples, timesteps, noise), scheduler.add_noise(samples, noise, timesteps)
    )


def test_config_round_trip_and_exchange(tmp_path):
    scheduler = MagiHumanFlowScheduler(flow_shift=7.0, sampler="renoise", solver_order=3)
    scheduler.save_pretrained(tmp_path)
    loaded = MagiHumanFlowScheduler.from_pretrained(tmp_path)
    assert (loaded.config.flow_shift, loaded.config.sampler, loaded.config.solver_order) == (7.0, "renoise", 3)
    unipc = diffusers.UniPCMultistepScheduler.from_config(loaded.config)
    assert unipc.config.flow_shift == 7.0 and unipc.config.prediction_type == "flow_prediction"
    assert MagiHumanFlowScheduler.from_config(unipc.config).config.flow_shift == 7.0


def test_configs_of_other_schedulers_change_nothing_that_is_fixed(tmp_path):
    # In a file every setting is spelled out, that of predicting noise too.
    other = diffusers.DPMSolverMultistepScheduler(prediction_type="epsilon", flow_shift=7.0)
    other.save_pretrained(tmp_path)
    scheduler = MagiHumanFlowScheduler.from_config(diffusers.DPMSolverMultistepScheduler.load_config(tmp_path))
    expected = MagiHumanFlowScheduler(flow_shift=7.0)
    assert {name: scheduler.config[name] for name in expected.config} == dict(expected.config)
    for each in (scheduler, expected):
        each.set_timesteps(3)
    sample = torch.randn(1, 2, 3)
    outputs = [each.step(velocity(sample), each.timesteps[0], sample).prev_sample for each in (scheduler, expected)]
    assert torch.equal(*outputs)


OTHERS = [
    diffusers.UniPCMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
]


@pytest.mark.parametrize("arguments", [{}, {"flow_shift": 7.0, "sampler": "renoise"}])
def test_saved_config_is_its_own_and_comes_back(arguments, tmp_path):
    scheduler = MagiHumanFlowScheduler(**arguments)
    scheduler.save_pretrained(tmp_path)
    own = {"num_train_timesteps": 1000, "flow_shift": 5.0, "sampler": "unipc", "solver_order": 2} | arguments
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved == own | {name: scheduler.config[name] for name in ("_class_name", "_diffusers_version")}
    loaded = MagiHumanFlowScheduler.from_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]  # Diffusers' own test says that a loaded config has none
    assert config == dict(loaded.config)
    for other in OTHERS:
        there, too = (other.from_config(each.config) for each in (scheduler, loaded))
        names = inspect.signature(other).parameters
        assert {name: there.config[name] for name in names} == {name: too.config[name] for name in names}
        there.set_timesteps(3)
        too.set_timesteps(3)
        assert torch.equal(there.sigmas, too.sigmas)
        back = MagiHumanFlowScheduler.from_config(there.config)
        assert {name: back.config[name] for name in scheduler.config} == dict(scheduler.config)


@pytest.mark.parametrize("sampler", ["unipc", "renoise"])
def test_steps_that_are_not_there_raise(sampler):
    scheduler, sample = MagiHumanFlowScheduler(sampler=sampler), torch.randn(2, 3)
    with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
        scheduler.step(sample, 999, sample)
    scheduler.set_timesteps(4)
    for timestep in (3, 5000.0, float("nan"), True, "999", None, torch.tensor(3), torch.tensor([999, 937])):
        with pytest.raises(ValueError, match=r"`timestep`=.* must be one of the 4 timesteps from 999 to 624"):
            scheduler.step(sample, timestep, sample)
    for other, shown in ((sample[:1], r"\(1, 3\)"), (torch.ones(1), r"\(1,\)"), (None, "None"), (sample > 0, "bool")):
        with pytest.raises(ValueError, match=f"`model_output`.*{shown}"):
            scheduler.step(other, 999, sample)
    assert scheduler.step_index is None
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample).prev_sample
    with pytest.raises(ValueError, match="all 4 steps are done"):
        scheduler.step(sample, timestep, sample)


@pytest.mark.parametrize("begin_index", [None, 1])
def test_noise_of_levels_that_are_not_there_raises(begin_index):
    scheduler, samples = MagiHumanFlowScheduler(), torch.randn(2, 3)
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    for timesteps in ([5000, -1], [999, 0], [999] * 3, []):
        with pytest.raises(ValueError, match=r"`timesteps?`=.* must be (one of the 1000|a tensor of shape \(2,\))"):
            scheduler.add_noise(samples, samples, torch.tensor(timesteps))
        with pytest.raises(ValueError, match=r"`timesteps?`="):
            scheduler.scale_noise(samples, torch.tensor(timesteps))
    with pytest.raises(ValueError, match="`noise` has shape"):
        scheduler.add_noise(samples, samples[:1], scheduler.timesteps[:1])
    with pytest.raises(ValueError, match="`original_samples` holds NaN"):
        scheduler.add_noise(samples * torch.nan, samples, scheduler.timesteps[:1])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"flow_shift": float("nan")}, "`flow_shift`=nan must be a number in 0.001 to 1000"),
        ({"flow_shift": -1}, "`flow_shift`=-1"),
        ({"solver_order": 9}, "`solver_order`=9 must be an integer in 1 to 3"),
        ({"num_train_timesteps": 10**9}, "`num_train_timesteps`=1000000000 must be an integer in 2 to 100000"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps`=1 "),
    ],
)
def test_wrong_config_raises(config, message):
    with pytest.raises(ValueError, match=message):
        MagiHumanFlowScheduler(**config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "`num_inference_steps`=0 must be an integer in 1 to 100000"),
        ({}, "`num_inference_steps`=None must be an integer"),
        ({"sigmas": []}, r"`sigmas`=\[\] must fall"),
        ({"sigmas": [0.5, 0.9]}, r"`sigmas`=\[0.5, 0.9\] must fall"),
        ({"sigmas": [0.9, float("nan")]}, r"`sigmas\[1\]`=nan must be a number"),
        ({"sigmas": "0.9"}, "`sigmas`='0.9' must be a list"),
        ({"num_inference_steps": 10**9}, "`num_inference_steps`=1000000000 must be an integer in 1 to 100000"),
        ({"sigmas": np.array([1.5, 0.5])}, r"`sigmas`=\[1.5, 0.5\] must fall from at most 1"),
    ],
)
def test_wrong_timesteps_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        MagiHumanFlowScheduler().set_timesteps(**arguments)


def test_wrong_use_raises():
    with pytest.raises(ValueError, match="`sampler`='ddim' must be 'unipc' or 'renoise'"):
        MagiHumanFlowScheduler(sampler="ddim")
    with pytest.raises(ValueError, match="set_timesteps"):
        MagiHumanFlowScheduler(sampler="renoise").step(torch.zeros(1), 999, torch.zeros(1))


def test_a_run_does_not_wait_for_the_device():
    scheduler, sample = MagiHumanFlowScheduler(), torch.randn(64, 3)
    scheduler.set_timesteps(4)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    scheduler.step(sample, scheduler.timesteps[1].to("meta"), sample)  # one that is elsewhere is not looked at
    assert scheduler.step_index == 2
    with count_reads() as reads:
        MagiHumanFlowScheduler().add_noise(sample, sample, scheduler.timesteps[:1].expand(64))
    assert len(reads) <= 2  # are the two finite?


def test_numbers_of_numpy_are_saved(tmp_path):
    scheduler = MagiHumanFlowScheduler(np.int64(900), np.float32(4), np.str_("renoise"), np.int32(3))
    scheduler.save_pretrained(tmp_path)
    config = MagiHumanFlowScheduler.from_pretrained(tmp_path).config
    names = ("num_train_timesteps", "flow_shift", "sampler", "solver_order")
    assert [config[name] for name in names] == [900, 4.0, "renoise", 3]
