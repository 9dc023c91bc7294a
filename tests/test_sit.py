"""sit.py: networks, losses and samplers, most of them against released implementations."""

import argparse
import json
from itertools import chain

import numpy as np
import pytest
import torch
from reference import ARRAYS, array, contract, fill, filled

import sit
from utils.files import load_torch
from utils.random import BatchRNG

CPU = torch.device("cpu")
TRANSFORMERS = (sit.SiT, sit.LightningDiT)


def by_token(image):
    """(B, C, g, g) -> (B, L, C), row by row."""
    return image.flatten(2).transpose(1, 2)


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record_first_block(model):
    """A dict that will hold the first block's output under "out"."""
    seen = {}
    model.blocks[0].register_forward_hook(lambda block, inputs, out: seen.update(out=out))
    return seen


# --------------------------------------------------------------------------------------------------
# Networks.


@pytest.fixture
def small_size(monkeypatch):
    """The size of the networks that the reference arrays were computed with."""
    monkeypatch.setitem(sit.GENERATOR_SIZES, "small", (96, 2, 4))


def small_sit() -> sit.SiT:
    model = sit.SiT(16, 8, 10, "small")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == contract("sit1d_small")
    return model


def test_forward_equals_the_released_implementation(small_size):
    model = small_sit()
    pos_embed = array("sit1d_small/pos_embed_init")
    torch.testing.assert_close(model.pos_embed[0], pos_embed, atol=1e-6, rtol=0)
    model.load_state_dict(filled("sit1d_small"))
    x, t, y = (array(f"sit1d_small/{name}") for name in "xty")
    torch.testing.assert_close(model(x, t, y), array("sit1d_small/out"), atol=1e-5, rtol=0)
    embedding = sit.timestep_embedding(t)
    torch.testing.assert_close(embedding, array("sit1d_small/t_sinusoid"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": {}, "ema": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ],
)
def test_released_files_load(small_size, wrap):
    small_sit().load_state_dict(sit.convert_checkpoint(wrap(filled("sit1d_small"))))


def test_a_released_training_checkpoint_loads_without_running_code(small_size, tmp_path):
    """It pickles its argparse arguments, which are a plain container."""
    arguments = argparse.Namespace(model="SiT")
    content = {"ema": filled("sit1d_small"), "args": arguments, "steps": 3}
    torch.save(content, tmp_path / "sit.pt")
    small_sit().load_state_dict(sit.convert_checkpoint(load_torch(tmp_path / "sit.pt")))


def test_xl_has_the_released_keys_and_shapes():
    with torch.device("meta"):
        model = sit.SiT(128, 32, 1000, "XL")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == contract("maetok_sit-xl-1_c32_l128")


def test_lightningdit_equals_the_released_implementation(small_size):
    case = "lightningdit2d_small"
    model = sit.LightningDiT(64, 8, 10, "small", is_2d=True)
    pos_embed = array(f"{case}/pos_embed_init")
    torch.testing.assert_close(model.pos_embed[0], pos_embed, atol=2e-6, rtol=0)
    attn = model.blocks[1].attn
    for rope, name in ((attn.sin, "sin"), (attn.cos, "cos")):
        expected = array(f"{case}/rope_{name}")
        torch.testing.assert_close(rope.repeat_interleave(2, 1), expected, atol=2e-6, rtol=0)
    released = {"ema": {f"module.{key}": value for key, value in filled(case).items()}}
    model.load_state_dict(sit.convert_checkpoint(released))

    x, t, y = (array(f"{case}/{name}") for name in "xty")
    seen = record_first_block(model)
    out = model(by_token(x), t, y)
    torch.testing.assert_close(out, by_token(array(f"{case}/out")), atol=1e-5, rtol=0)
    after_block = array(f"{case}/after_block0")
    torch.testing.assert_close(seen["out"][:, ::5], after_block, atol=1e-5, rtol=0)
    # The probe's numbers are tiny, so that they show the norm's eps.
    probe = model.blocks[0].norm1(array(f"{case}/norm_probe"))
    torch.testing.assert_close(probe, array(f"{case}/norm_probe_out"), atol=1e-5, rtol=0)


def test_lightningdit_equals_detok_in_1d(small_size):
    """DeTok's network is the same but for three things.

    It has learned positions, which the file holds, no rotary attention, and PyTorch's own eps,
    which is 1.19e-7.
    """
    case = "lightningdit1d_small"
    model = sit.LightningDiT(20, 8, 10, "small")
    state = {}
    for key, weight in filled(case).items():
        key = key.removeprefix("transformer.")
        state[key.replace("layer.norm.", "layer.norm_final.")] = weight
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps
        elif isinstance(module, sit.RoPEAttention):  # no angle
            module.sin.fill_(0)
            module.cos.fill_(1)

    x, t, y = (array(f"{case}/{name}") for name in "xty")
    seen = record_first_block(model)
    torch.testing.assert_close(model(x, t, y), array(f"{case}/out"), atol=1e-5, rtol=0)
    after_block = array(f"{case}/after_block0")
    torch.testing.assert_close(seen["out"][:, ::4], after_block, atol=1e-5, rtol=0)
    probe = model.blocks[0].norm1(array(f"{case}/norm_probe"))
    torch.testing.assert_close(probe, array(f"{case}/norm_probe_out"), atol=1e-5, rtol=0)


def test_lightningdit_xl_has_the_released_keys_and_shapes():
    released_shapes = contract("lightningdit_xl-1_c32_16x16")
    with torch.device("meta"):
        model = sit.LightningDiT(256, 32, 1000, "XL", is_2d=True)
        released = {key: torch.empty(shape) for key, shape in released_shapes.items()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    converted = sit.convert_checkpoint(released)
    assert shapes == {key: value.shape for key, value in converted.items()}


@pytest.mark.parametrize("is_2d", [False, True])
def test_rotary_attention_sees_only_how_far_apart_tokens_are(is_2d):
    x = random_tensor(2, 16, 16, seed=1)
    places = torch.arange(16)

    def attend(x, rope):
        torch.manual_seed(0)  # the same weights
        return sit.RoPEAttention(16, 2, rope)(x)

    rope = sit.get_pos_embed(16, 8, is_2d)
    here = attend(x, rope)
    if is_2d:
        rows = sit.sincos_1d(places // 4 + 5, 4)
        columns = sit.sincos_1d(places % 4 + 9, 4)
        moved = torch.cat([rows, columns], dim=1)
    else:
        moved = sit.sincos_1d(places + 5, 8)
    torch.testing.assert_close(attend(x, moved), here, atol=1e-6, rtol=0)
    # Without positions the other tokens would not see that two are swapped.
    swapped = attend(x[:, [1, 0, *range(2, 16)]], rope)
    assert not torch.allclose(swapped[:, 2:], here[:, 2:], atol=1e-4)


def test_positions_of_a_grid_and_of_a_sequence():
    grid = sit.sincos_2d(4, 128)
    sequence = sit.sincos_1d(torch.arange(16), 128)
    for network in TRANSFORMERS:
        of_grid = network(16, 4, 0, "toy", is_2d=True).pos_embed[0]
        of_sequence = network(16, 4, 0, "toy").pos_embed[0]
        # The order of the channels does not change the products.
        torch.testing.assert_close(of_grid @ of_grid.T, grid @ grid.T)
        torch.testing.assert_close(of_sequence @ of_sequence.T, sequence @ sequence.T)
    assert torch.equal(sit.SiT(16, 4, 0, "toy", is_2d=True).pos_embed[0], grid)


def test_lightningdit_in_bf16():
    model = sit.LightningDiT(4, 3, 2, "toy")
    for parameter in model.parameters():  # none of them zero
        generator = torch.Generator().manual_seed(parameter.numel())
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    inputs = (random_tensor(2, 4, 3), torch.tensor([0.2, 0.9]), torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(*inputs), atol=5e-3, rtol=0)


@pytest.mark.parametrize("network", TRANSFORMERS)
@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes(size, millions, network):
    with torch.device("meta"):
        model = network(128, 32, 1000, size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("network", TRANSFORMERS)
def test_unconditional_and_initially_zero(network):
    model = network(4, 3, 0, "toy")
    assert model.y_embedder["embedding_table"].weight.shape[0] == 1
    labels = torch.zeros(2, dtype=torch.long)
    assert not model(torch.randn(2, 4, 3), torch.rand(2), labels).any()


@pytest.mark.parametrize("network", TRANSFORMERS)
def test_an_unknown_size_is_named(network):
    with pytest.raises(ValueError, match="generator size 'huge' is not one of toy, S, B, L, XL"):
        network(4, 3, 0, "huge")


# --------------------------------------------------------------------------------------------------
# Training.


def test_times_are_uniform_or_logit_normal():
    u = (torch.arange(10_000) + 0.5) / 10_000
    uniform = sit.SiT(4, 3, 0, "toy")
    logit_normal = sit.LightningDiT(4, 3, 0, "toy")
    assert uniform.sample_t(u) is u
    at = torch.tensor([0.1, 0.5, 0.8])
    expected = torch.distributions.Normal(0.0, 1.0).icdf(at).sigmoid()
    quantiles = logit_normal.sample_t(u).quantile(at)
    torch.testing.assert_close(quantiles, expected, atol=1e-4, rtol=0)
    ends = logit_normal.sample_t(torch.tensor([0.0, 1.0]))
    assert 0 < ends[0] < 0.01
    assert 0.99 < ends[1] < 1
    normal = array("lightningdit_loss/t_normal")
    t = logit_normal.sample_t(torch.special.ndtr(normal)).float()
    torch.testing.assert_close(t, array("lightningdit_loss/t"))


def test_loss_equals_the_reference():
    names = ("x", "noise", "t", "model_output")
    x, noise, t, output = (array(f"sit_loss/{name}") for name in names)
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
    names = ("x1", "x0", "t", "x_t", "v_target", "model_output")
    case = {name: array(f"lightningdit_loss/{name}") for name in names}
    seen = {}

    def model(x_t, t, y):
        seen["x_t"] = x_t
        return -by_token(case["model_output"])

    x = by_token(case["x1"])
    noise = by_token(case["x0"])
    loss = sit.flow_matching_loss(model, x, None, 1 - case["t"], noise, weight)
    torch.testing.assert_close(seen["x_t"], by_token(case["x_t"]), atol=5e-6, rtol=0)
    expected = array("lightningdit_loss/mse_loss") + weight * array("lightningdit_loss/cos_loss")
    torch.testing.assert_close(loss, expected, atol=5e-6, rtol=0)
    if weight == 1:
        total = array("lightningdit_loss/total_loss")
        torch.testing.assert_close(loss.mean(), total, atol=5e-6, rtol=0)


@pytest.mark.parametrize("factor, cos_loss", [(1.0, 0.0), (3.0, 0.0), (-1.0, 2.0), (0.0, 1.0)])
def test_the_cosine_is_that_of_directions(factor, cos_loss):
    x, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    t = torch.rand(2)

    def model(*_):
        return factor * (noise - x)

    without = sit.flow_matching_loss(model, x, None, t, noise, 0.0)
    with_cosine = sit.flow_matching_loss(model, x, None, t, noise, 2.0)
    expected = torch.full((2,), 2 * cos_loss)
    torch.testing.assert_close(with_cosine - without, expected, atol=1e-5, rtol=0)


def test_time_runs_from_data_to_noise():
    x, noise = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    seen = []

    def model(x_t, *_):
        seen.append(x_t)
        return x_t

    for t in (0.0, 1.0):
        sit.flow_matching_loss(model, x, None, torch.tensor([t]), noise)
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], noise)
    exact = sit.flow_matching_loss(lambda *_: noise - x, x, None, torch.tensor([0.3]), noise)
    assert exact.item() < 1e-12


def test_label_dropout_replaces_a_tenth():
    rand = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    y = sit.drop_labels(torch.arange(10).repeat(1000), 10, rand)
    assert abs((y == 10).float().mean() - 0.1) < 0.01


@pytest.mark.parametrize("network", TRANSFORMERS)
def test_a_generators_loss_is_that_of_its_times_noise_and_dropped_labels(network):
    model = network(4, 3, 10, "toy")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(64, 4, 3)
    y = torch.arange(64) % 10
    rng = BatchRNG(0, 64, slice(0, 64), CPU)
    t = model.sample_t(rng.rand())
    noise = rng.randn(4, 3)
    dropped = sit.drop_labels(y, 10, rng.rand())
    assert (dropped == 10).any()
    expected = sit.flow_matching_loss(model, x, dropped, t, noise, model.cosine_weight)
    loss = model.loss(x, y, BatchRNG(0, 64, slice(0, 64), CPU))
    assert loss.shape == (64,)
    assert torch.equal(loss, expected)


# --------------------------------------------------------------------------------------------------
# Sampling.


class ReferenceVelocity:
    """The analytic network that the sampler cases were computed with; counts its calls and rows."""

    def __init__(self, a, b, c, d):
        self.a = a
        self.b = b
        self.c = c
        self.d = d
        self.calls = 0
        self.rows = 0

    def __call__(self, x, t, y):
        self.calls += 1
        self.rows += len(x)
        t = t[:, None, None]
        label = torch.sin(self.c * y.double() + 0.5).to(x.dtype)[:, None, None]
        x_part = self.a * x.tanh() * (1 - 0.5 * t) + self.d * t * x.roll(1, -1)
        return x_part + self.b * label * torch.cos(2 * x + 3 * t)


def small_reference_velocity():
    return ReferenceVelocity(0.8, 0.9, 0.37, 0.25)


CASES = json.loads(str(ARRAYS["sampler/cases"]))
LINEAR_CASES = [
    case for case in CASES["cases"] if case["path_type"] == "linear" or case["sampler"] != "sde"
]


def solver_of(case):
    if case["sampler"] == "sde":
        return "sde"
    return "heun" if case["heun"] else "euler"


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: str(case["id"]))
def test_sampler_equals_the_reference(case):
    network = ReferenceVelocity(**CASES["coefficients"])
    num_steps = case["num_steps"]
    noise = chain([array("sampler/latents").double()], array(f"sampler/noise_{num_steps}"))
    y = array("sampler/y")
    settings = {
        "solver": solver_of(case),
        "num_steps": num_steps,
        "cfg_scale": case["cfg_scale"],
        "guidance_interval": (case["guidance_low"], case["guidance_high"]),
    }
    if case["cfg_scale"] < 1:
        sentence = f"guidance {case['cfg_scale']} must be a finite number of at least 1"
        with pytest.raises(ValueError, match=sentence):
            sit.sample(network, noise, y, CASES["null_label"], **settings)
        assert network.calls == 0
        return
    out = sit.sample(network, noise, y, CASES["null_label"], **settings)
    torch.testing.assert_close(out, array(f"sampler/out_{case['id']}_float64"), atol=1e-11, rtol=0)
    assert network.calls == case["network_calls"]
    assert network.rows == case["network_rows_per_sample"] * len(y)


def lightningdit_velocity(x, t, y):
    """The network of LightningDiT's sampler cases, on (B, C, g, g).

    It is used the way a released one is: time and velocity are turned round.
    """
    a, b, c, d = array("lightningdit_sampler/coefficients").tolist()
    t = 1 - t[:, None, None, None]
    label = torch.sin(c * y.double() + 0.5)[:, None, None, None]
    x_part = a * x.tanh() * (1 - 0.5 * t)
    label_part = b * label * torch.cos(2 * x + 3 * t)
    return -(x_part + label_part + d * t * x.roll(1, -1))


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("num_points", [10, 50])
def test_shifted_sampler_equals_lightningdits(monkeypatch, num_points, shift):
    """Theirs counts points in time, one more than steps, and rounds them to float32.

    Without a shift it is called 0.0 there.
    """
    name = f"n{num_points}_shift{0.0 if shift == 1 else shift}"
    num_steps = num_points - 1
    times = 1 - array(f"lightningdit_sampler/t_{name}").double()
    starts, ends = sit.time_steps("euler", num_steps, shift)
    torch.testing.assert_close(torch.cat([starts, ends[-1:]]), times, atol=2e-7, rtol=0)
    expected = array(f"lightningdit_sampler/out_{name}_nocfg_float64")

    def sample():
        noise = iter([array("lightningdit_sampler/latents").double()])
        y = array("lightningdit_sampler/y")
        return sit.sample(
            lightningdit_velocity, noise, y, 1000, "euler", num_steps, timestep_shift=shift
        )

    torch.testing.assert_close(sample(), expected, atol=1e-6, rtol=0)
    monkeypatch.setattr(sit, "time_steps", lambda *_: (times[:-1], times[1:]))
    torch.testing.assert_close(sample(), expected, atol=1e-11, rtol=0)


def test_shift_one_changes_no_bit_of_the_times():
    for solver in ("euler", "heun", "sde"):
        for num_steps in (1, 7, 50):
            plain = sit.time_steps(solver, num_steps)
            shifted = sit.time_steps(solver, num_steps, 1.0)
            assert all(map(torch.equal, plain, shifted))
    starts, _ = sit.time_steps("heun", 50, 1.0)
    assert torch.equal(starts, torch.linspace(1, 0, 51, dtype=torch.float64)[:-1])
    starts, ends = sit.time_steps("heun", 4, 0.25)  # t / (t + shift (1 - t))
    assert starts.tolist() == pytest.approx([1, 12 / 13, 4 / 5, 4 / 7])
    assert ends[-1] == 0
    noise = iter([torch.zeros(1, 2, 2)])
    with pytest.raises(ValueError, match=r"shift 0.25 .* sde"):
        sit.sample(None, noise, torch.zeros(1), 3, "sde", timestep_shift=0.25)


def gaussian_velocity(mean: float, std: float):
    """v(x, t) = E[noise - x_0 | x_t] for data N(mean, std^2) on the linear path."""

    def velocity(x, t, y):
        t = t[:, None, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        centered = x - (1 - t) * mean
        return (t - (1 - t) * std**2) / variance * centered - mean

    return velocity


@pytest.mark.parametrize(
    "solver, num_steps, tolerance", [("euler", 400, 0.02), ("heun", 60, 0.01), ("sde", 400, 0.05)]
)
def test_samplers_carry_noise_to_a_gaussian(solver, num_steps, tolerance):
    noise = sit.per_sample_noise(0, list(range(4000)), (2, 2), CPU)
    y = torch.zeros(4000, dtype=torch.long)
    x = sit.sample(gaussian_velocity(1.5, 0.4), noise, y, 1, solver, num_steps)
    assert x.mean().item() == pytest.approx(1.5, abs=tolerance)
    assert x.std().item() == pytest.approx(0.4, abs=tolerance)


def test_guidance_one_is_conditional_and_an_interval_outside_costs_nothing():
    def sample(cfg_scale, interval=(0.0, 1.0)):
        network = small_reference_velocity()
        noise = sit.per_sample_noise(1, [0, 1], (3, 2), CPU)
        y = torch.tensor([1, 2])
        x = sit.sample(network, noise, y, 3, "heun", 10, cfg_scale, interval)
        return x, network.rows

    plain, plain_rows = sample(1.0)
    outside, outside_rows = sample(4.0, (0.951, 0.999))  # no step starts in there
    guided, guided_rows = sample(4.0)
    assert torch.equal(plain, outside)
    assert plain_rows == outside_rows == 38
    assert guided_rows == 76
    assert not torch.allclose(plain, guided)


def test_guidance_extrapolates_every_channel():
    """With v_y = y and v_null = 0, guidance w moves each channel by w y over the whole time."""

    def network(x, t, y):
        return torch.where(y == 9, 0, y).to(x.dtype)[:, None, None].expand_as(x)

    noise = sit.per_sample_noise(0, [0], (3, 5), CPU)
    start = next(sit.per_sample_noise(0, [0], (3, 5), CPU))
    x = sit.sample(network, noise, torch.tensor([2]), 9, "euler", 7, 3.0, (0.0, 1.0))
    torch.testing.assert_close(x, start.double() - 6.0)


@pytest.mark.parametrize("solver, num_calls, num_guided", [("euler", 10, 5), ("heun", 19, 9)])
def test_autoguidance_extrapolates_from_the_guide(solver, num_calls, num_guided):
    """With v_y = y of the model and v_null = -1 of the guide, x moves by v_null + w (y + 1).

    Outside of the interval it moves by y.
    """
    calls = {"model": [], "guide": []}

    def model(x, t, y):
        calls["model"].append(y.tolist())
        return y.to(x.dtype)[:, None, None].expand_as(x)

    def guide_model(x, t, y):
        calls["guide"].append(y.tolist())
        return torch.full_like(x, -1.0)

    noise = sit.per_sample_noise(0, [0, 1], (3, 5), CPU)
    start = next(sit.per_sample_noise(0, [0, 1], (3, 5), CPU)).double()
    y = torch.tensor([2, 4])
    interval = (0.0, 0.55)  # the steps from 0.5 on are guided
    x = sit.sample(model, noise, y, 9, solver, 10, 3.0, interval, guide_model=guide_model)
    moved = 0.5 * (-1 + 3 * (y + 1)) + 0.5 * y
    torch.testing.assert_close(x, start - moved[:, None, None])
    assert calls == {"model": [[2, 4]] * num_calls, "guide": [[9, 9]] * num_guided}


def test_a_model_that_guides_itself_is_ordinary_guidance():
    results = []
    costs = []
    y = torch.tensor([1, 2])
    for guides_itself in (False, True):
        network = small_reference_velocity()
        noise = sit.per_sample_noise(1, [0, 1], (3, 2), CPU)
        guide = network if guides_itself else None
        results.append(sit.sample(network, noise, y, 3, "sde", 10, 2.0, guide_model=guide))
        costs.append((network.calls, network.rows))
    torch.testing.assert_close(*results)
    # 7 of 10 steps are guided: in one call of twice the rows, or in two calls.
    assert costs == [(10, 34), (17, 34)]
    # With guidance 1 the guide is not asked.
    noise = sit.per_sample_noise(1, [0], (3, 2), CPU)
    sit.sample(network, noise, y[:1], 3, "euler", 4, 1.0, guide_model=lambda *_: 1 / 0)


def test_a_generators_samples_are_guided_with_its_own_null_label():
    model = sit.SiT(4, 3, 10, "toy")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    y = torch.tensor([3, 7])
    settings = {"solver": "heun", "num_steps": 3, "cfg_scale": 2.0}

    def noise():
        return sit.per_sample_noise(0, [0, 1], (4, 3), CPU)

    x = model.sample(noise(), y, **settings)
    assert x.dtype == torch.float64
    assert torch.equal(x, sit.sample(model, noise(), y, 10, **settings))


def test_noise_depends_on_the_index_only():
    together = sit.per_sample_noise(5, [3, 4], (2, 2), CPU)
    alone = sit.per_sample_noise(5, [4], (2, 2), CPU)
    for _ in range(3):
        assert torch.equal(next(together)[1:], next(alone))
    first = next(sit.per_sample_noise(5, [3], (2, 2), CPU))
    other_seed = next(sit.per_sample_noise(6, [3], (2, 2), CPU))
    assert not np.array_equal(first, other_seed)


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
        (("euler", 5, 1.0, (0, 1), 0.0), r"shift 0.0"),
        (("heun", 5, 1.0, (0, 1), -0.3), r"shift -0.3"),
        (("euler", 5, 1.0, (0, 1), float("nan")), "shift nan"),
        (("euler", 5, 1.0, (0, 1), float("inf")), "shift inf"),
        (("sde", 5, 1.0, (0, 1), 0.3), r"shift 0.3 .* sde"),
    ],
)
def test_impossible_samplers_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        sit.check_sampler(*settings)


def test_the_fill_rule():
    """First values of the deterministic weights, as published with the reference files."""
    first = fill("blocks.0.norm1.weight", [384])[0].item()
    assert first == pytest.approx(1.0644257068634033)
    total = fill("patch_embed.proj.weight", [384, 3, 14, 14]).sum().item()
    assert total == pytest.approx(28.034, abs=1e-2)
