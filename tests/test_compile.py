"""torch.compile changes no loss, leaves no graph unfinished, and compiles nothing again and again.

A cheap backend stands in for the real one, which needs a C++ compiler and minutes.
"""

import pytest
import torch
from reference import ALL_TERMS, RECIPES, TINY, log_lines, succeed
from torch import nn
from torch._dynamo.utils import counters

STEPS = "--tokenizer_steps 3 --decoder_steps 1 --generator_steps 2 --log_every 1"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiles(recipe, images, weights, tmp_path, monkeypatch):
    real_compile = nn.Module.compile
    graphs = []

    def count_and_run(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def cheap_compile(self):
        real_compile(self, backend=count_and_run)

    monkeypatch.setattr(nn.Module, "compile", cheap_compile)
    words = f"{TINY} {STEPS} {ALL_TERMS} --recipe {recipe} --data {images} --weights {weights}"
    counters.clear()
    torch._dynamo.reset()
    succeed("train.py", words, f"--out {tmp_path}/plain")
    succeed("train.py", words, f"--out {tmp_path}/compiled", "--compile")
    assert 0 < len(graphs) < 20
    assert not counters["graph_break"]
    stages = {path.stem for path in tmp_path.glob("plain/*.pt")}
    for stage in stages:
        plain = log_lines(tmp_path / "plain", stage)
        compiled = log_lines(tmp_path / "compiled", stage)
        for a, b in zip(plain, compiled, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
