"""SiT and LightningDiT: flow-matching transformers on latent tokens, their loss and samplers (paper section 4.1 and B.2).

Time has one direction here: t = 0 is data, t = 1 is noise.

    x_t = (1 - t) x + t noise
    v   = d x_t / d t = noise - x    what the network predicts
    sampling integrates v from t = 1 down to t = 0

    python -c "import torch as t, sit; print(sit.SiT(16, 8, 10, 'toy')(t.zeros(2, 16, 8), t.rand(2), t.arange(2)).shape)"

Shapes: x (B, L, C) normalised latents, t (B,) in [0, 1], y (B,) int64 class labels in [0, num_classes].
The label num_classes is the null label: "no class", used for classifier-free guidance and for data without classes.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import Attention, Mlp, init_linear, sincos_1d, sincos_2d

# (width, depth, heads). Parameters: S 33M, B 130M, L 458M, XL 675M (paper: XL).
SIZES = {"toy": (128, 6, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def timestep_sinusoid(t: Tensor, dim: int = 256) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim): cos(t w_i) then sin(t w_i), w_i = 10000^(-i / (dim / 2))."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sincos(tokens: int, width: int, grid: bool) -> Tensor:
    """(L, width): the sine and cosine of a token's place at width / 2 frequencies; in a square grid a half each for row, column."""
    return sincos_2d(math.isqrt(tokens), width) if grid else sincos_1d(torch.arange(tokens), width)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, L, D) with shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class RotaryAttention(Attention):
    """Attention in which it counts how far apart tokens are: q and k are turned by the angles of table (T, D / heads), `sincos`."""

    def __init__(self, width: int, heads: int, table: Tensor):
        super().__init__(width, heads)
        self.register_buffer("table", table.unflatten(1, (-1, 2)).movedim(2, 0), persistent=False)  # (2, T, D / heads / 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.turn(q), self.turn(k), v)

    def turn(self, x: Tensor) -> Tensor:
        """x (B, heads, T, D / heads): neighbouring channels are a point (a, b)."""
        (sin, cos), (a, b) = self.table, x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """(..., width) -> (..., width) with two thirds of an Mlp's hidden channels: three matrices then have as many parameters."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * width // 3
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition c (adaLN-Zero)."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm(width), attention, norm(width), mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """(B, L, D) -> (B, L, C)."""

    def __init__(self, width: int, channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Velocity v(x, t, y). Parameter names are those of the released 1D SiT files (see `official_state`).

    tokens = L, channels = C, num_classes >= 0 (0: unconditional, every label is the null label 0); grid: the tokens are a square
    grid, row by row. What another generator does in its own way stands as class attributes.
    """

    betas, cosine_weight, solver, shift = (0.9, 0.999), 0.0, "sde", 1.0  # to train and to sample with (config: SiT, REPA)
    time = staticmethod(lambda u: u)  # uniform draws (B,) -> times (B,)
    positions = staticmethod(sincos)
    norm = staticmethod(lambda width: nn.LayerNorm(width, elementwise_affine=False, eps=1e-6))
    attention = staticmethod(lambda width, heads, table: Attention(width, heads))
    mlp = staticmethod(lambda width: Mlp(width, 4 * width, width, gelu="tanh"))

    def __init__(self, tokens: int, channels: int, num_classes: int, size: str = "XL", grid: bool = False):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"sit size is {size!r}; it must be one of {', '.join(SIZES)}")
        width, depth, heads = SIZES[size]
        self.num_classes = num_classes
        self.x_embedder = nn.Linear(channels, width)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})  # the last is the null label
        self.pos_embed = nn.Parameter(self.positions(tokens, width, grid)[None], requires_grad=False)
        table = sincos(tokens, width // heads, grid)
        parts = ((self.attention(width, heads, table), self.mlp(width)) for _ in range(depth))
        self.blocks = nn.ModuleList(SiTBlock(width, self.norm, *pair) for pair in parts)
        self.final_layer = FinalLayer(width, channels, self.norm)
        self.apply(init_linear)  # from here on DiT's start: every block is the identity, the output is zero
        for layer in (self.y_embedder["embedding_table"], self.t_embedder["mlp"][0], self.t_embedder["mlp"][2]):
            nn.init.normal_(layer.weight, std=0.02)
        modulations = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, L, C), t (B,), y (B,) -> velocity (B, L, C)."""
        x = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        c = self.t_embedder["mlp"](timestep_sinusoid(t)) + self.y_embedder["embedding_table"](y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class LightningDiT(SiT):
    """SiT with RMSNorm, SwiGLU and rotary attention (config: hustvl/LightningDiT; MAETok tab. 9).

    Released networks run from noise at t = 0 to data: with their weights, v(x, t, y) is -model(x, 1 - t, y).
    """

    betas, cosine_weight, solver, shift = (0.9, 0.95), 1.0, "euler", 0.3
    time = staticmethod(lambda u: torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid())  # logit-normal; clamped: finite
    norm = staticmethod(lambda width: nn.RMSNorm(width, eps=1e-6))
    attention, mlp = RotaryAttention, SwiGLU

    @staticmethod
    def positions(tokens: int, width: int, grid: bool) -> Tensor:
        """`sincos` in hustvl's order: the half of the column before that of the row, and in each the sines before the cosines."""
        return sincos(tokens, width, grid).unflatten(1, (2 if grid else 1, -1, 2)).flip(1).transpose(2, 3).flatten(1)


GENERATORS = {"sit": SiT, "lightningdit": LightningDiT}


def official_state(checkpoint: dict) -> dict[str, Tensor]:
    """The weights of a released SiT or LightningDiT: flat, or under "ema" or "model", with or without wrapper prefixes."""
    state = checkpoint.get("ema", checkpoint.get("model", checkpoint))
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    # LightningDiT's: a 1x1 convolution for our linear layer, and a table that is computed here.
    renamed = {key.replace("x_embedder.proj.", "x_embedder."): value for key, value in state.items() if "feat_rope" not in key}
    return {key: value.flatten(1) if value.ndim == 4 else value for key, value in renamed.items()}


def drop_labels(y: Tensor, null_label: int, uniform: Tensor, probability: float = 0.1) -> Tensor:
    """y (B,) -> y with the null label where uniform (B,) < probability, so that guidance has an unconditional model."""
    return torch.where(uniform < probability, null_label, y)


def flow_matching_loss(model: Callable, x: Tensor, y: Tensor, t: Tensor, noise: Tensor, cosine_weight: float = 0.0) -> Tensor:
    """(B,), float32 or better: |model(x_t, t, y) - v|^2, a mean over L and C, of the linear path (section B.2).

    LightningDiT adds cosine_weight (1 - cosine over C), a mean over L.
    """
    s = t[:, None, None]
    x_t, v = (1 - s) * x + s * noise, noise - x
    prediction = model(x_t, t, y).to(v.dtype)
    loss = (prediction - v).square().mean(dim=(1, 2))
    if cosine_weight:
        angle = 1 - F.cosine_similarity(prediction, v, dim=2, eps=1e-8)  # (B, L)
        loss = loss + cosine_weight * angle.mean(dim=1)
    return loss


def score(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -E[noise | x] / t, where E[noise | x] = x + (1 - t) v."""
    return -(x + (1 - t) * v) / t


def seeded_noise(seed: int, indices: list[int], shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Endless N(0, 1) batches (len(indices), *shape), float32. Row i depends only on (seed, indices[i])."""
    generators = [np.random.default_rng((seed, index)) for index in indices]
    while True:
        rows = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        yield torch.from_numpy(rows).to(device)


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Iterator[Tensor],
    y: Tensor,
    null_label: int,
    solver: str = "sde",
    steps: int = 250,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 0.7),
    shift: float = 1.0,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrate from noise to data -> (B, L, C), float64.

    model     velocity v(x, t, y); called with the dtype of the noise, while the state is kept in float64
    noise     first item: x at t = 1, (B, L, C); the SDE takes one more item per step but the last
    solver    "euler" or "heun" (ODE), "sde" (Euler-Maruyama with diffusion 2t, last step 0.04 -> 0 without noise)
    guidance  w >= 1 in v = v_null + w (v_y - v_null), applied when interval[0] <= t <= interval[1]; elsewhere, and for w = 1,
              only v_y is computed. Heun's second evaluation is guided when its first one is.
    shift     s of an ODE solver's time steps: each t becomes t / (t + s (1 - t)) (config: LightningDiT 0.3)
    guide     a weaker network that v_null is taken from (autoguidance, MAETok 4.5), else it is the model's own
    Paper B.2: w = 2.3 (128 tokens) or 2.4 (64). Config (REPA's, which B.2 follows): sde, 250 steps, interval [0, 0.7].
    Raises ValueError for what `check_sampler` refuses.
    """
    check_sampler(solver, steps, guidance, interval, shift)
    start = next(noise)
    x, dtype = start.double(), start.dtype
    null = torch.full_like(y, null_label)

    def velocity(x: Tensor, t: Tensor, guided: bool) -> Tensor:
        x, t = x.to(dtype), t.to(dtype).expand(len(x))
        if not guided:
            return model(x, t, y).double()
        if guide is None:
            v_y, v_null = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).double().chunk(2)
        else:
            v_y, v_null = model(x, t, y).double(), guide(x, t, null).double()
        return v_null + guidance * (v_y - v_null)

    for i, (t, t_next) in enumerate(zip(*time_steps(solver, steps, shift))):
        guided = guidance > 1 and interval[0] <= t <= interval[1]
        t, t_next = t.to(x.device), t_next.to(x.device)
        dt = t_next - t
        v = velocity(x, t, guided)
        if solver == "sde":
            x = x + (v - t * score(x, v, t)) * dt
            if i + 1 < steps:
                x = x + torch.sqrt(2 * t * -dt) * next(noise).double()
        elif solver == "heun" and i + 1 < steps:
            x = x + (v + velocity(x + v * dt, t_next, guided)) / 2 * dt
        else:
            x = x + v * dt
    return x


def time_steps(solver: str, steps: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """The start and the end of each step, float64 (steps,): 1 -> 0, for the SDE 1 -> 0.04 and then 0."""
    if solver == "sde":
        grid = torch.cat([torch.linspace(1, 0.04, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    else:
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        grid = grid / (1 + (shift - 1) * (1 - grid))  # a shift below 1 puts more of them near the noise
    return grid[:-1], grid[1:]


def check_sampler(solver: str, steps: int, guidance: float, interval: tuple[float, float], shift: float = 1.0) -> None:
    """Raises ValueError, naming the value, when `sample` cannot be called so."""
    if solver not in ("euler", "heun", "sde"):
        raise ValueError(f"solver is {solver!r}; it must be euler, heun or sde")
    if steps < 1:
        raise ValueError(f"{steps} sampling steps; at least 1 is needed")
    if not math.isfinite(guidance) or guidance < 1:
        raise ValueError(f"guidance is {guidance}; it must be a finite number of at least 1 (1 = no guidance)")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance interval [{interval[0]}, {interval[1]}] must lie in [0, 1], the lower end first")
    if not 0 < shift < math.inf or (solver == "sde" and shift != 1):
        raise ValueError(f"shift is {shift}; it must be a finite number above 0, and 1 with the solver sde")
