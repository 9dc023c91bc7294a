import argparse
import json
from itertools import chain

import numpy as np
import pytest
import torch
from reference import ARRAYS, array, contract, fill, filled

import sit
from plumbing.run import load_checkpoint


def small_sit(monkeypatch) -> sit.SiT:
    monkeypatch.setitem(sit.SIZES, "small", (96, 2, 4))
    model = sit.SiT(16, 8, 10, "small")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == contract("sit1d_small")
    return model


def test_forward_equals_the_released_implementation(monkeypatch):
    model = small_sit(monkeypatch)
    torch.testing.assert_close(model.pos_embed[0], array("sit1d_small/pos_embed_init"), atol=1e-6, rtol=0)
    model.load_state_dict(filled("sit1d_small"))
    x, t, y = (array(f"sit1d_small/{name}") for name in "xty")
    torch.testing.assert_close(model(x, t, y), array("sit1d_small/out"), atol=1e-5, rtol=0)
    torch.testing.assert_close(sit.timestep_sinusoid(t), array("sit1d_small/t_sinusoid"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": {}, "ema": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_released_files_load(monkeypatch, wrap):
    small_sit(monkeypatch).load_state_dict(sit.official_state(wrap(filled("sit1d_small"))))


def test_a_released_training_checkpoint_loads_without_running_code(monkeypatch, tmp_path):
    """It pickles its argparse arguments, a plain container."""
    content = {"ema": filled("sit1d_small"), "args": argparse.Namespace(model="SiT"), "steps": 3}
    torch.save(content, tmp_path / "sit.pt")
    small_sit(monkeypatch).load_state_dict(sit.official_state(load_checkpoint(tmp_path / "sit.pt")))


def test_xl_has_the_released_keys_and_shapes():
    with torch.device("meta"):
        model = sit.SiT(128, 32, 1000, "XL")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == contract("maetok_sit-xl-1_c32_l128")


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes(size, millions):
    with torch.device("meta"):
        model = sit.SiT(128, 32, 1000, size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_unconditional_and_initially_zero():
    model = sit.SiT(4, 3, 0, "toy")
    assert model.y_embedder["embedding_table"].weight.shape[0] == 1
    assert not model(torch.randn(2, 4, 3), torch.rand(2), torch.zeros(2, dtype=torch.long)).any()


def test_loss_equals_the_reference():
    x, noise, t, output = (array(f"sit_loss/{name}") for name in ("x", "noise", "t", "model_output"))
    seen = {}

    def model(x_t, t, y):
        seen["x_t"] = x_t
        return output

    loss = sit.flow_matching_loss(model, x, torch.zeros(4), t, noise)
    torch.testing.assert_close(seen["x_t"], array("sit_loss/linear_x_t"), atol=3e-6, rtol=0)
    torch.testing.assert_close(loss, array("sit_loss/linear_loss"), atol=3e-6, rtol=1e-6)


def test_time_runs_from_data_to_noise():
    x, noise = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    seen = []
    for t in (0.0, 1.0):
        sit.flow_matching_loss(lambda x_t, *_: seen.append(x_t) or x_t, x, None, torch.tensor([t]), noise)
    assert torch.equal(seen[0], x) and torch.equal(seen[1], noise)
    exact = sit.flow_matching_loss(lambda *_: noise - x, x, None, torch.tensor([0.3]), noise)
    assert exact.item() < 1e-12


def test_label_dropout_replaces_a_tenth():
    y = sit.drop_labels(torch.arange(10).repeat(1000), 10, torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    assert abs((y == 10).float().mean() - 0.1) < 0.01


class ReferenceVelocity:
    """The analytic network that the sampler cases were computed with; counts its calls and rows."""

    def __init__(self, a, b, c, d):
        self.a, self.b, self.c, self.d = a, b, c, d
        self.calls = self.rows = 0

    def __call__(self, x, t, y):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        t = t[:, None, None]
        label = torch.sin(self.c * y.double() + 0.5).to(x.dtype)[:, None, None]
        x_part = self.a * x.tanh() * (1 - 0.5 * t) + self.d * t * x.roll(1, -1)
        return x_part + self.b * label * torch.cos(2 * x + 3 * t)


CASES = json.loads(str(ARRAYS["sampler/cases"]))
LINEAR = [case for case in CASES["cases"] if case["path_type"] == "linear" or case["sampler"] != "sde"]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: str(case["id"]))
def test_sampler_equals_the_reference(case):
    network = ReferenceVelocity(**CASES["coefficients"])
    steps = case["num_steps"]
    solver = "sde" if case["sampler"] == "sde" else "heun" if case["heun"] else "euler"
    noise = chain([array("sampler/latents").double()], array(f"sampler/noise_{steps}"))
    interval = (case["guidance_low"], case["guidance_high"])
    y = array("sampler/y")
    settings = (network, noise, y, CASES["null_label"], solver, steps, case["cfg_scale"], interval)
    if case["cfg_scale"] < 1:
        with pytest.raises(ValueError, match=f"guidance is {case['cfg_scale']}; it must be a finite number of at least 1"):
            sit.sample(*settings)
        assert network.calls == 0
        return
    out = sit.sample(*settings)
    torch.testing.assert_close(out, array(f"sampler/out_{case['id']}_float64"), atol=1e-11, rtol=0)
    assert network.calls == case["network_calls"]
    assert network.rows == case["network_rows_per_sample"] * len(y)


def gaussian_velocity(mean: float, std: float):
    """v(x, t) = E[noise - x_0 | x_t] for data N(mean, std^2) on the linear path."""

    def velocity(x, t, y):
        t = t[:, None, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        centred = x - (1 - t) * mean
        return (t - (1 - t) * std**2) / variance * centred - mean

    return velocity


@pytest.mark.parametrize("solver, steps, tolerance", [("euler", 400, 0.02), ("heun", 60, 0.01), ("sde", 400, 0.05)])
def test_samplers_carry_noise_to_a_gaussian(solver, steps, tolerance):
    noise = sit.seeded_noise(0, list(range(4000)), (2, 2), torch.device("cpu"))
    y = torch.zeros(4000, dtype=torch.long)
    x = sit.sample(gaussian_velocity(1.5, 0.4), noise, y, 1, solver, steps)
    assert x.mean().item() == pytest.approx(1.5, abs=tolerance)
    assert x.std().item() == pytest.approx(0.4, abs=tolerance)


def test_guidance_one_is_conditional_and_an_interval_outside_costs_nothing():
    def run(guidance, interval=(0.0, 1.0)):
        network = ReferenceVelocity(0.8, 0.9, 0.37, 0.25)
        noise = sit.seeded_noise(1, [0, 1], (3, 2), torch.device("cpu"))
        return sit.sample(network, noise, torch.tensor([1, 2]), 3, "heun", 10, guidance, interval), network.rows

    plain, rows = run(1.0)
    outside, outside_rows = run(4.0, (0.951, 0.999))  # no step starts in there
    guided, guided_rows = run(4.0)
    assert torch.equal(plain, outside) and rows == outside_rows == 38
    assert guided_rows == 76 and not torch.allclose(plain, guided)


def test_guidance_extrapolates_every_channel():
    """With v_y = y and v_null = 0, guidance w moves each channel by w y over the whole time."""

    def network(x, t, y):
        return torch.where(y == 9, 0, y).to(x.dtype)[:, None, None].expand_as(x)

    noise = sit.seeded_noise(0, [0], (3, 5), torch.device("cpu"))
    start = next(sit.seeded_noise(0, [0], (3, 5), torch.device("cpu")))
    x = sit.sample(network, noise, torch.tensor([2]), 9, "euler", 7, 3.0, (0.0, 1.0))
    torch.testing.assert_close(x, start.double() - 6.0)


def test_noise_depends_on_the_index_only():
    cpu = torch.device("cpu")
    together = sit.seeded_noise(5, [3, 4], (2, 2), cpu)
    alone = sit.seeded_noise(5, [4], (2, 2), cpu)
    for _ in range(3):
        assert torch.equal(next(together)[1:], next(alone))
    assert not np.array_equal(next(sit.seeded_noise(5, [3], (2, 2), cpu)), next(sit.seeded_noise(6, [3], (2, 2), cpu)))


@pytest.mark.parametrize(
    "settings, named",
    [
        (("rk4", 5, 1.0, (0, 1)), "rk4"),
        (("sde", 0, 1.0, (0, 1)), "0 sampling"),
        (("sde", 5, -1.0, (0, 1)), "-1"),
        (("sde", 5, 0.999, (0, 1)), "0.999"),
        (("sde", 5, float("nan"), (0, 1)), "nan"),
        (("sde", 5, float("inf"), (0, 1)), "inf"),
        (("sde", 5, 1.0, (0.7, 0.2)), "0.7"),
    ],
)
def test_impossible_samplers_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        sit.check_sampler(*settings)


def test_the_fill_rule():
    """First values of the deterministic weights, as published with the reference files."""
    assert fill("blocks.0.norm1.weight", [384])[0].item() == pytest.approx(1.0644257068634033)
    assert fill("patch_embed.proj.weight", [384, 3, 14, 14]).sum().item() == pytest.approx(28.034, abs=1e-2)
