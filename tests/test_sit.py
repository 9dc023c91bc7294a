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


def by_token(image):
    """(B, C, g, g) -> (B, L, C), row by row."""
    return image.flatten(2).transpose(1, 2)


def first_block(model):
    """What the first block will have given, under "out"."""
    seen = {}
    model.blocks[0].register_forward_hook(lambda block, inputs, out: seen.update(out=out))
    return seen


def test_lightningdit_equals_the_released_implementation(monkeypatch):
    monkeypatch.setitem(sit.SIZES, "small", (96, 2, 4))
    case, model = "lightningdit2d_small", sit.LightningDiT(64, 8, 10, "small", grid=True)
    torch.testing.assert_close(model.pos_embed[0], array(f"{case}/pos_embed_init"), atol=2e-6, rtol=0)
    for table, name in zip(model.blocks[1].attn.table, ("sin", "cos")):
        torch.testing.assert_close(table.repeat_interleave(2, 1), array(f"{case}/rope_{name}"), atol=2e-6, rtol=0)
    model.load_state_dict(sit.official_state({"ema": {f"module.{key}": value for key, value in filled(case).items()}}))
    (x, t, y), seen = (array(f"{case}/{name}") for name in "xty"), first_block(model)
    torch.testing.assert_close(model(by_token(x), t, y), by_token(array(f"{case}/out")), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["out"][:, ::5], array(f"{case}/after_block0"), atol=1e-5, rtol=0)
    probe = model.blocks[0].norm1(array(f"{case}/norm_probe"))  # tiny numbers, which show its eps
    torch.testing.assert_close(probe, array(f"{case}/norm_probe_out"), atol=1e-5, rtol=0)


def test_lightningdit_equals_detok_in_1d(monkeypatch):
    """DeTok's has learned positions, which the file holds, no rotary, and PyTorch's own eps, 1.19e-7: the rest is the same."""
    monkeypatch.setitem(sit.SIZES, "small", (96, 2, 4))
    case, model = "lightningdit1d_small", sit.LightningDiT(20, 8, 10, "small")
    state = {key.removeprefix("transformer.").replace("layer.norm.", "layer.norm_final."): w for key, w in filled(case).items()}
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps
        elif isinstance(module, sit.RotaryAttention):
            module.table.copy_(torch.tensor([0.0, 1.0])[:, None, None])  # sine and cosine of no angle
    (x, t, y), seen = (array(f"{case}/{name}") for name in "xty"), first_block(model)
    torch.testing.assert_close(model(x, t, y), array(f"{case}/out"), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["out"][:, ::4], array(f"{case}/after_block0"), atol=1e-5, rtol=0)
    probe = model.blocks[0].norm1(array(f"{case}/norm_probe"))
    torch.testing.assert_close(probe, array(f"{case}/norm_probe_out"), atol=1e-5, rtol=0)


def test_lightningdit_xl_has_the_released_keys_and_shapes():
    with torch.device("meta"):
        model = sit.LightningDiT(256, 32, 1000, "XL", grid=True)
        released = {key: torch.empty(shape) for key, shape in contract("lightningdit_xl-1_c32_16x16").items()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in sit.official_state(released).items()}


@pytest.mark.parametrize("grid", [False, True])
def test_rotary_attention_sees_only_how_far_apart_tokens_are(grid):
    x, places = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16)

    def attend(x, table):
        torch.manual_seed(0)  # the same weights
        return sit.RotaryAttention(16, 2, table)(x)

    here = attend(x, sit.sincos(16, 8, grid))
    rows, columns = sit.sincos_1d(places // 4 + 5, 4), sit.sincos_1d(places % 4 + 9, 4)
    moved = torch.cat([rows, columns], dim=1) if grid else sit.sincos_1d(places + 5, 8)
    torch.testing.assert_close(attend(x, moved), here, atol=1e-6, rtol=0)
    swapped = attend(x[:, [1, 0, *range(2, 16)]], sit.sincos(16, 8, grid))  # without positions the others would not see it
    assert not torch.allclose(swapped[:, 2:], here[:, 2:], atol=1e-4)


def test_positions_of_a_grid_and_of_a_sequence():
    for network in sit.GENERATORS.values():
        square, line = network(16, 4, 0, "toy", grid=True).pos_embed[0], network(16, 4, 0, "toy").pos_embed[0]
        torch.testing.assert_close(square @ square.T, sit.sincos_2d(4, 128) @ sit.sincos_2d(4, 128).T)
        torch.testing.assert_close(line @ line.T, sit.sincos_1d(torch.arange(16), 128) @ sit.sincos_1d(torch.arange(16), 128).T)
    assert torch.equal(sit.SiT(16, 4, 0, "toy", grid=True).pos_embed[0], sit.sincos_2d(4, 128))


def test_lightningdit_in_bf16():
    model = sit.LightningDiT(4, 3, 2, "toy")
    for parameter in model.parameters():  # none of them zero
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9]), torch.arange(2)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(*inputs), atol=5e-3, rtol=0)


def test_times_are_uniform_or_logit_normal():
    u = (torch.arange(10_000) + 0.5) / 10_000
    assert sit.SiT.time(u) is u
    at = torch.tensor([0.1, 0.5, 0.8])
    expected = torch.distributions.Normal(0.0, 1.0).icdf(at).sigmoid()
    torch.testing.assert_close(sit.LightningDiT.time(u).quantile(at), expected, atol=1e-4, rtol=0)
    ends = sit.LightningDiT.time(torch.tensor([0.0, 1.0]))
    assert 0 < ends[0] < 0.01 and 0.99 < ends[1] < 1
    normal = array("lightningdit_loss/t_normal")
    torch.testing.assert_close(sit.LightningDiT.time(torch.special.ndtr(normal)).float(), array("lightningdit_loss/t"))


@pytest.mark.parametrize("network", sit.GENERATORS.values())
@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes(size, millions, network):
    with torch.device("meta"):
        model = network(128, 32, 1000, size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("network", sit.GENERATORS.values())
def test_unconditional_and_initially_zero(network):
    model = network(4, 3, 0, "toy")
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


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_loss_with_a_cosine_equals_lightningdits(weight):
    """Its time runs the other way: t = 1 is data there, and the velocity has the other sign."""
    case, seen = {name: array(f"lightningdit_loss/{name}") for name in ("x1", "x0", "t", "x_t", "v_target", "model_output")}, {}

    def model(x_t, t, y):
        seen["x_t"] = x_t
        return -by_token(case["model_output"])

    loss = sit.flow_matching_loss(model, by_token(case["x1"]), None, 1 - case["t"], by_token(case["x0"]), weight)
    torch.testing.assert_close(seen["x_t"], by_token(case["x_t"]), atol=5e-6, rtol=0)
    expected = array("lightningdit_loss/mse_loss") + weight * array("lightningdit_loss/cos_loss")
    torch.testing.assert_close(loss, expected, atol=5e-6, rtol=0)
    if weight == 1:
        torch.testing.assert_close(loss.mean(), array("lightningdit_loss/total_loss"), atol=5e-6, rtol=0)


def test_the_cosine_is_that_of_directions():
    x, noise, t = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.rand(2)
    for factor, angle in ((1.0, 0.0), (3.0, 0.0), (-1.0, 2.0), (0.0, 1.0)):
        plain, both = (sit.flow_matching_loss(lambda *_: factor * (noise - x), x, None, t, noise, w) for w in (0.0, 2.0))  # noqa: B023
        torch.testing.assert_close(both - plain, torch.full((2,), 2 * angle), atol=1e-5, rtol=0)


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


def lightningdit_velocity(x, t, y):
    """The network of its sampler cases, on (B, C, g, g), the way a released one is used: time and velocity turned round."""
    a, b, c, d = array("lightningdit_sampler/coefficients").tolist()
    t = 1 - t[:, None, None, None]
    label = torch.sin(c * y.double() + 0.5)[:, None, None, None]
    return -(a * x.tanh() * (1 - 0.5 * t) + b * label * torch.cos(2 * x + 3 * t) + d * t * x.roll(1, -1))


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("points", [10, 50])
def test_shifted_sampler_equals_lightningdits(monkeypatch, points, shift):
    """Theirs counts points in time, one more than steps, and rounds them to float32; without a shift it is called 0.0."""
    name = f"n{points}_shift{0.0 if shift == 1 else shift}"
    grid = 1 - array(f"lightningdit_sampler/t_{name}").double()
    starts, ends = sit.time_steps("euler", points - 1, shift)
    torch.testing.assert_close(torch.cat([starts, ends[-1:]]), grid, atol=2e-7, rtol=0)
    out = array(f"lightningdit_sampler/out_{name}_nocfg_float64")

    def run():
        noise, y = iter([array("lightningdit_sampler/latents").double()]), array("lightningdit_sampler/y")
        return sit.sample(lightningdit_velocity, noise, y, 1000, "euler", points - 1, shift=shift)

    torch.testing.assert_close(run(), out, atol=1e-6, rtol=0)
    monkeypatch.setattr(sit, "time_steps", lambda *_: (grid[:-1], grid[1:]))
    torch.testing.assert_close(run(), out, atol=1e-11, rtol=0)


def test_shift_one_changes_no_bit_of_a_grid():
    for solver in ("euler", "heun", "sde"):
        for steps in (1, 7, 50):
            assert all(map(torch.equal, sit.time_steps(solver, steps), sit.time_steps(solver, steps, 1.0)))
    starts, _ = sit.time_steps("heun", 50, 1.0)
    assert torch.equal(starts, torch.linspace(1, 0, 51, dtype=torch.float64)[:-1])
    starts, ends = sit.time_steps("heun", 4, 0.25)  # t / (t + shift (1 - t))
    assert starts.tolist() == pytest.approx([1, 12 / 13, 4 / 5, 4 / 7]) and ends[-1] == 0
    with pytest.raises(ValueError, match=r"shift is 0.25; .* sde"):
        sit.sample(None, iter([torch.zeros(1, 2, 2)]), torch.zeros(1), 3, "sde", shift=0.25)


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


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_autoguidance_extrapolates_from_the_guide(solver):
    """With v_y = y of the model and v_null = -1 of the guide, guidance w moves by v_null + w (y + 1), in the interval only."""
    calls = {"model": [], "guide": []}

    def model(x, t, y):
        calls["model"].append(y.tolist())
        return y.to(x.dtype)[:, None, None].expand_as(x)

    def guide(x, t, y):
        calls["guide"].append(y.tolist())
        return torch.full_like(x, -1.0)

    noise, start = (sit.seeded_noise(0, [0, 1], (3, 5), torch.device("cpu")) for _ in range(2))
    y, start = torch.tensor([2, 4]), next(start).double()
    x = sit.sample(model, noise, y, 9, solver, 10, 3.0, (0.0, 0.55), guide=guide)  # guided in the steps from 0.5 on
    moved = 0.5 * (-1 + 3 * (y + 1)) + 0.5 * y
    torch.testing.assert_close(x, start - moved[:, None, None])
    evaluations, guided = (10, 5) if solver == "euler" else (19, 9)
    assert calls == {"model": [[2, 4]] * evaluations, "guide": [[9, 9]] * guided}


def test_a_model_that_guides_itself_is_ordinary_guidance():
    results, rows = [], []
    for itself in (False, True):
        network = ReferenceVelocity(0.8, 0.9, 0.37, 0.25)
        noise = sit.seeded_noise(1, [0, 1], (3, 2), torch.device("cpu"))
        y, guide = torch.tensor([1, 2]), network if itself else None
        results.append(sit.sample(network, noise, y, 3, "sde", 10, 2.0, guide=guide))
        rows.append((network.calls, network.rows))
    torch.testing.assert_close(*results)
    assert rows == [(10, 34), (17, 34)]  # guided in 7 of 10 steps: in one call of twice the rows, or in two
    noise = sit.seeded_noise(1, [0], (3, 2), torch.device("cpu"))
    sit.sample(network, noise, torch.tensor([1]), 3, "euler", 4, 1.0, guide=lambda *_: 1 / 0)  # not asked with guidance 1


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
        (("euler", 5, 1.0, (0, 1), 0.0), r"shift is 0.0"),
        (("heun", 5, 1.0, (0, 1), -0.3), r"shift is -0.3"),
        (("euler", 5, 1.0, (0, 1), float("nan")), "shift is nan"),
        (("euler", 5, 1.0, (0, 1), float("inf")), "shift is inf"),
        (("sde", 5, 1.0, (0, 1), 0.3), r"shift is 0.3; .* sde"),
    ],
)
def test_impossible_samplers_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        sit.check_sampler(*settings)


def test_the_fill_rule():
    """First values of the deterministic weights, as published with the reference files."""
    assert fill("blocks.0.norm1.weight", [384])[0].item() == pytest.approx(1.0644257068634033)
    assert fill("patch_embed.proj.weight", [384, 3, 14, 14]).sum().item() == pytest.approx(28.034, abs=1e-2)
