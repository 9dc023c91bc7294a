"""A training step stays on its GPU and never makes the CPU wait for it. Tried without a GPU.

A `FarTensor` says that it lies on another device, but its values are on the CPU. Every operation of
the real training loops goes through `Simulator`, which fails if an operation mixes devices, or if
it would wait for a GPU within a step. What it cannot see: the order in which a GPU works, its
kernels, memory, bfloat16 and anything of CUDA's own.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from reference import ALL_TERMS, RECIPES, TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sit
import train
from build import TrainContext, build_gan, build_tokenizer
from dry_run import RandomLatents
from options import parse_config
from utils.distributed import Distributed
from utils.metric_log import MetricLog

# Operations whose result decides what the CPU does next, or how large a tensor is.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select",
    "masked_scatter_backward", "bincount", "_unique2",
}  # fmt: skip
STEPS = "--tokenizer_steps 2 --decoder_steps 1 --generator_steps 2 --batch_size 2 --micro_batch 1"


class FarTensor(torch.Tensor):
    """Says that it is on the device "meta", which autograd takes without hardware."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = (values.size(), values.stride(), values.storage_offset())
        far = torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=values.dtype, device="meta")
        far.values = values
        return far

    # The simulator sees all operations before.
    __torch_dispatch__ = classmethod(lambda *arguments: NotImplemented)


class Simulator(TorchDispatchMode):
    """Computes on the values of far tensors, and complains."""

    in_step = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_device = str(kwargs.get("device") or "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = {id(x.values): x for x in tensors if isinstance(x, FarTensor)}
        near = [x for x in tensors if not isinstance(x, FarTensor)]
        if not far and to_device != "meta":
            return op(*args, **kwargs)
        self.check(op, tensors, near, to_device, kwargs.get("non_blocking"))
        if torch.Tag.inplace_view in op.tags:  # a far tensor has a shape of its own
            with torch._C._DisableTorchDispatch():
                op(*args, **kwargs)
        if to_device:
            kwargs = kwargs | {"device": "cpu"}
        args, kwargs = tree_map_only(FarTensor, lambda x: x.values, (args, kwargs))
        out = op(*args, **kwargs)
        to_cpu = op.overloadpacket.__name__ == "copy_" and id(args[0]) not in far
        if to_device == "cpu" or to_cpu:
            return out

        def move(x: torch.Tensor) -> FarTensor:
            return far[id(x)] if id(x) in far else FarTensor(x)

        return tree_map_only(torch.Tensor, move, out)

    def check(self, op, tensors: list, near: list, to_device: str, non_blocking: bool) -> None:
        name = op.overloadpacket.__name__
        is_copy = name in ("_to_copy", "copy_")
        has_shape = any(x.ndim for x in near)  # a single number on the CPU may go along
        assert is_copy or not has_shape, f"{op} mixes devices"
        crosses = is_copy and (to_device == "cpu" or near) and not non_blocking
        selects = "index" in name and any(x.dtype == torch.bool for x in tensors)
        waits = crosses or selects or name in WAITING
        assert not (Simulator.in_step and waits), f"{op} waits for the GPU"


@pytest.fixture
def simulate(images, weights, tmp_path, monkeypatch):
    """A function that opens a run of some flags on a far device."""

    class GeneratorOnCPU:
        def __new__(cls, device="cpu", real=torch.Generator):
            return real()

    def step_seed(*key, real=train.step_seed):
        Simulator.in_step = True  # the first call of each step
        return real(*key)

    def end_step(self, real=MetricLog.end_step):
        Simulator.in_step = False
        real(self)

    monkeypatch.setattr(torch, "Generator", GeneratorOnCPU)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    for module in ("torch.optim.optimizer", "torch.optim.adamw", "torch.optim.adam"):
        name = "_get_fused_kernels_supported_devices"
        monkeypatch.setattr(sys.modules[module], name, lambda: ["meta"], raising=False)
    monkeypatch.setattr(train, "step_seed", step_seed)
    monkeypatch.setattr(MetricLog, "end_step", end_step)
    monkeypatch.setattr(Simulator, "in_step", False)
    monkeypatch.setattr(train, "save", lambda *args: None)
    monkeypatch.setattr(train, "reconstruction_quality", lambda *args: {})
    monkeypatch.setattr(train, "draw_masks", lambda *args: None)

    def open_run(*words: str) -> TrainContext:
        folders = f"--weights {weights} --data {images} --out {tmp_path}"
        config, options = parse_config(" ".join((TINY, STEPS, folders, *words)).split())
        return TrainContext.open(config, Distributed(0, 1, torch.device("meta")), options)

    return open_run


def train_stage(context: TrainContext, stage: str) -> None:
    with Simulator():
        tokenizer = context.to_device(build_tokenizer(context.config))
        gan = build_gan(context.device)
        train.train_tokenizer(context, stage, tokenizer, gan)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_on_images_stays_on_its_device_and_waits_for_nothing(recipe, simulate):
    context = simulate(ALL_TERMS, "--discriminator_start 0 --recipe", recipe)
    for stage in context.config.stages:
        train_stage(context, stage)


@pytest.mark.parametrize("generator", ["sit", "lightningdit"])
def test_a_step_on_latents_stays_on_its_device_and_waits_for_nothing(generator, simulate):
    context = simulate("--generator", generator)
    with Simulator():
        tokenizer = context.to_device(build_tokenizer(context.config))
        latents = RandomLatents(4, 4)
        train.train_generator(context, tokenizer, latents, encoder_hash="")


@pytest.mark.parametrize("solver", ["sde", "heun", "euler"])
def test_a_sampler_waits_for_nothing(solver, simulate, monkeypatch):
    simulate()
    with Simulator():
        model = sit.SiT(4, 4, 10, "toy").to("meta")
        noise = iter([torch.randn(2, 4, 4).to("meta") for _ in range(3)])
        labels = torch.zeros(2, dtype=torch.long).to("meta")
        monkeypatch.setattr(Simulator, "in_step", True)
        model.sample(noise, labels, solver=solver, num_steps=3, cfg_scale=2.0)


@pytest.mark.parametrize("recipe", RECIPES[::2])
@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda x, rand: x + torch.zeros(x.shape), "mixes devices"),
        (lambda x, rand: x * x.mean().item(), "waits for the GPU"),
        (lambda x, rand: x + x[x > 0].mean(), "waits for the GPU"),
    ],
)
def test_the_simulator_finds_faults(recipe, fault, message, simulate, monkeypatch):
    context = simulate("--recipe", recipe)
    monkeypatch.setattr(train, "random_flip", fault)
    with pytest.raises(AssertionError, match=message):
        train_stage(context, "tokenizer")
