"""Flow-matching transformers on latent tokens: SiT and LightningDiT (MacTok section 4.1 and B.2).

Time has one direction in this project: t = 0 is data, t = 1 is noise.

    x_t = (1 - t) x + t noise        the linear path
    v   = d x_t / d t = noise - x    the velocity, which the network predicts
    sampling integrates v from t = 1 down to t = 0

Labels y (B,) are int64 in [0, num_classes]. The label num_classes is the null label, which stands
for "no class": classifier-free guidance and data without classes use it.

`python sit.py` samples from an untrained network.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import Attention, Mlp, init_linear, sincos_1d, sincos_2d

# Width, depth and number of heads. S has 33M parameters, B 130M, L 458M and XL 675M (paper: XL).
GENERATOR_SIZES = {
    "toy": (128, 6, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


# --------------------------------------------------------------------------------------------------
# Embeddings.


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim): cos(t w_i), then sin(t w_i), with w_i = 10000^(-2i / dim)."""
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def get_pos_embed(num_tokens: int, width: int, is_2d: bool) -> Tensor:
    """Sine-cosine positions (L, width) of a sequence or, if `is_2d`, of a square grid."""
    if is_2d:
        return sincos_2d(math.isqrt(num_tokens), width)
    return sincos_1d(torch.arange(num_tokens), width)


# --------------------------------------------------------------------------------------------------
# What every generator has.


class Generator(nn.Module):
    """A network forward(x, t, y) that predicts velocities, how it is trained, and how it samples.

    To try another generator, write a subclass with __init__(num_tokens, latent_dim, num_classes,
    size, is_2d), which sets null_label to num_classes, and with forward; then give it a row in
    GENERATORS. A generator of another kind overrides loss and sample, too. Transformer blocks
    belong in `self.blocks`, where torch.compile looks for them.
    """

    betas = (0.9, 0.999)  # of AdamW (config: SiT)
    cosine_weight = 0.0  # weight of a cosine loss that is added to the squared error
    default_solver = "sde"  # (config: REPA)
    default_shift = 1.0  # no shift of the ODE solvers' time steps

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, L, C), t (B,) in [0, 1], y (B,) -> velocity (B, L, C)."""
        raise NotImplementedError

    def sample_t(self, u: Tensor) -> Tensor:
        """Uniform numbers (B,) -> training times (B,): uniform for SiT (config)."""
        return u

    def loss(self, x: Tensor, y: Tensor, rng) -> Tensor:
        """The flow-matching loss (B,) of normalized latents x (B, L, C) with labels y (B,).

        `rng` draws for the rows of the batch: rng.rand(*shape) is uniform, rng.randn(*shape) is
        normal, both of shape (B, *shape) (utils/random.py).
        """
        t = self.sample_t(rng.rand())
        noise = rng.randn(*x.shape[1:])
        y = drop_labels(y, self.null_label, rng.rand())
        return flow_matching_loss(self, x, y, t, noise, self.cosine_weight)

    def sample(self, noise: Iterator[Tensor], y: Tensor, **settings) -> Tensor:
        """Latents (B, L, C) for labels y (B,); see the function `sample` below for the settings."""
        return sample(self, noise, y, self.null_label, **settings)


# --------------------------------------------------------------------------------------------------
# SiT.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D), shift and scale (B, D) -> (B, L, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """A transformer block with norms shifted, scaled and gated by a condition (adaLN-Zero)."""

    def __init__(self, width: int, norm: Callable[[], nn.Module], attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1 = norm()
        self.attn = attn
        self.norm2 = norm()
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, L, D), condition c (B, D) -> (B, L, D)."""
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """x (B, L, D), condition c (B, D) -> velocities (B, L, C)."""

    def __init__(self, width: int, latent_dim: int, norm: nn.Module):
        super().__init__()
        self.norm_final = norm
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(Generator):
    """A transformer that is conditioned on time and label by adaLN-Zero (Ma et al. 2024).

    num_tokens    L
    latent_dim    C
    num_classes   0 means unconditional: then every label is the null label 0
    size          a key of GENERATOR_SIZES
    is_2d         True if the tokens are a square grid, row by row

    The parameter names are those of released 1D SiT files (see `convert_checkpoint`).
    """

    def __init__(
        self,
        num_tokens: int,
        latent_dim: int,
        num_classes: int,
        size: str = "XL",
        is_2d: bool = False,
    ):
        super().__init__()
        if size not in GENERATOR_SIZES:
            raise ValueError(f"generator size {size!r} is not one of {', '.join(GENERATOR_SIZES)}")
        width, depth, num_heads = GENERATOR_SIZES[size]
        self.null_label = num_classes
        self.x_embedder = nn.Linear(latent_dim, width)
        t_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": t_mlp})
        table = nn.Embedding(num_classes + 1, width)  # the last row is the null label's
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        pos_embed = self.make_pos_embed(num_tokens, width, is_2d)
        self.pos_embed = nn.Parameter(pos_embed[None], requires_grad=False)
        sizes = (width, num_heads, num_tokens, is_2d)
        self.blocks = nn.ModuleList(self.make_block(*sizes) for _ in range(depth))
        self.final_layer = FinalLayer(width, latent_dim, self.make_norm(width))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's initialization: every block starts as the identity, and the output as zero."""
        self.apply(init_linear)
        t_mlp = self.t_embedder["mlp"]
        for layer in (self.y_embedder["embedding_table"], t_mlp[0], t_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    # LightningDiT overrides these three methods.

    def make_norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def make_block(self, width: int, num_heads: int, num_tokens: int, is_2d: bool) -> nn.Module:
        attn = Attention(width, num_heads)
        mlp = Mlp(width, 4 * width, width, gelu="tanh")
        return SiTBlock(width, lambda: self.make_norm(width), attn, mlp)

    def make_pos_embed(self, num_tokens: int, width: int, is_2d: bool) -> Tensor:
        """(L, width)."""
        return get_pos_embed(num_tokens, width, is_2d)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        t_embedding = self.t_embedder["mlp"](timestep_embedding(t))
        y_embedding = self.y_embedder["embedding_table"](y)
        condition = t_embedding + y_embedding  # (B, D)
        for block in self.blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)


# --------------------------------------------------------------------------------------------------
# LightningDiT.


class RoPEAttention(Attention):
    """Self-attention with rotary position embedding.

    rope (T, D / heads) holds sines and cosines of the positions, as `get_pos_embed` returns
    them. Queries and keys are rotated by these angles, so that their products depend only on how
    far apart two tokens are.
    """

    def __init__(self, width: int, num_heads: int, rope: Tensor):
        super().__init__(width, num_heads)
        sin, cos = rope.unflatten(1, (-1, 2)).unbind(dim=-1)  # each (T, D / heads / 2)
        self.register_buffer("sin", sin.contiguous(), persistent=False)
        self.register_buffer("cos", cos.contiguous(), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.apply_rope(q), self.apply_rope(k), v)

    def apply_rope(self, x: Tensor) -> Tensor:
        """x (B, heads, T, D / heads) -> the same shape; neighboring channels are points (a, b)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(dim=-1)
        rotated_a = a * self.cos - b * self.sin
        rotated_b = a * self.sin + b * self.cos
        return torch.stack([rotated_a, rotated_b], dim=-1).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """(..., width) -> (..., width). Three matrices with as many parameters as the two of `Mlp`."""

    def __init__(self, width: int):
        super().__init__()
        hidden_dim = 8 * width // 3
        self.w12 = nn.Linear(width, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LightningDiT(SiT):
    """SiT with RMSNorm, SwiGLU and rotary attention (config: hustvl/LightningDiT; MAETok tab. 9).

    Released networks run from noise at t = 0 to data at t = 1. With their weights, v(x, t, y) is
    -model(x, 1 - t, y).
    """

    betas = (0.9, 0.95)
    cosine_weight = 1.0
    default_solver = "euler"
    default_shift = 0.3

    def make_norm(self, width: int) -> nn.Module:
        return nn.RMSNorm(width, eps=1e-6)

    def make_block(self, width: int, num_heads: int, num_tokens: int, is_2d: bool) -> nn.Module:
        rope = get_pos_embed(num_tokens, width // num_heads, is_2d)
        attn = RoPEAttention(width, num_heads, rope)
        return SiTBlock(width, lambda: self.make_norm(width), attn, SwiGLU(width))

    def make_pos_embed(self, num_tokens: int, width: int, is_2d: bool) -> Tensor:
        """In the channel order of hustvl's code: columns before rows, sines before cosines."""
        pos_embed = get_pos_embed(num_tokens, width, is_2d)
        # (L, 2, width / 4, 2): row or column, frequency, sine or cosine.
        # (L, 1, width / 2, 2) in 1D.
        parts = pos_embed.unflatten(1, (2 if is_2d else 1, -1, 2)).flip(1)
        return parts.transpose(2, 3).flatten(1)

    def sample_t(self, u: Tensor) -> Tensor:
        """Logit-normal times. The uniform numbers are clamped so that no time is infinite."""
        return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()


GENERATORS = {"sit": SiT, "lightningdit": LightningDiT}


def convert_checkpoint(checkpoint: dict) -> dict[str, Tensor]:
    """The state dict of a released SiT or LightningDiT.

    Released files hold the weights directly or under "ema" or "model", with or without the prefixes
    of DistributedDataParallel and torch.compile.
    """
    state = checkpoint.get("ema", checkpoint.get("model", checkpoint))
    converted = {}
    for key, weight in state.items():
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
        if "feat_rope" in key:  # LightningDiT's rotary table, which is computed here
            continue
        if weight.ndim == 4:  # its 1x1 convolution, which is a linear layer here
            weight = weight.flatten(1)
        converted[key.replace("x_embedder.proj.", "x_embedder.")] = weight
    return converted


# --------------------------------------------------------------------------------------------------
# Training.


def drop_labels(y: Tensor, null_label: int, rand: Tensor, probability: float = 0.1) -> Tensor:
    """Replace labels by the null label where rand (B,) < probability, for guidance (config)."""
    return torch.where(rand < probability, null_label, y)


def flow_matching_loss(
    model: Callable, x: Tensor, y: Tensor, t: Tensor, noise: Tensor, cosine_weight: float = 0.0
) -> Tensor:
    """|model(x_t, t, y) - v|^2 as a mean over L and C (section B.2) -> (B,).

    It is computed in the dtype of x, which is float32 or better. LightningDiT adds
    cosine_weight * (1 - cos(prediction, v)), a mean over L of cosines over C.
    """
    t_column = t[:, None, None]
    x_t = (1 - t_column) * x + t_column * noise
    v = noise - x
    prediction = model(x_t, t, y).to(v.dtype)
    loss = (prediction - v).square().mean(dim=(1, 2))
    if cosine_weight:
        cos_loss = 1 - F.cosine_similarity(prediction, v, dim=2, eps=1e-8)  # (B, L)
        loss = loss + cosine_weight * cos_loss.mean(dim=1)
    return loss


# --------------------------------------------------------------------------------------------------
# Sampling.


def per_sample_noise(
    seed: int, indices: list[int], shape: tuple[int, ...], device: torch.device
) -> Iterator[Tensor]:
    """Endless batches of N(0, 1) noise (len(indices), *shape), float32.

    Row i depends on (seed, indices[i]) only, so a sample does not depend on its batch.
    """
    rngs = [np.random.default_rng((seed, index)) for index in indices]
    while True:
        rows = [rng.standard_normal(shape, dtype=np.float32) for rng in rngs]
        yield torch.from_numpy(np.stack(rows)).to(device)


def score(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -E[noise | x] / t with E[noise | x] = x + (1 - t) v, on the linear path."""
    return -(x + (1 - t) * v) / t


def time_steps(solver: str, num_steps: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Where each step starts and ends, float64 (num_steps,) each.

    ODE solvers go from 1 to 0. A shift s moves each time t to t / (t + s (1 - t)), so that s < 1
    puts more steps near the noise. The SDE goes from 1 to 0.04, and then in one step to 0.
    """
    if solver == "sde":
        t_steps = torch.linspace(1, 0.04, num_steps, dtype=torch.float64)
        t_steps = torch.cat([t_steps, torch.zeros(1, dtype=torch.float64)])
    else:
        t_steps = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        t_steps = t_steps / (t_steps + shift * (1 - t_steps))
    return t_steps[:-1], t_steps[1:]


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Iterator[Tensor],
    y: Tensor,
    null_label: int,
    solver: str = "sde",
    num_steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 0.7),
    timestep_shift: float = 1.0,
    guide_model: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrate the velocity from noise to data -> (B, L, C), float64.

    model              velocity v(x, t, y); it is called in the dtype of the noise, while the
                       state is kept in float64
    noise              its first item is x at t = 1, (B, L, C); the SDE takes one more item per step
                       except for the last
    solver             "euler" or "heun" for the ODE, or "sde": Euler-Maruyama with the diffusion
                       coefficient 2t, whose last step from 0.04 to 0 adds no noise. The last step
                       of Heun is Euler's
    cfg_scale          w >= 1 in v = v_null + w (v_y - v_null)
    guidance_interval  guidance is on while low <= t <= high. Elsewhere, and for w = 1, only v_y is
                       computed. Heun's second evaluation is guided if its first one is
    timestep_shift     see `time_steps`; the SDE takes none (config: LightningDiT 0.3)
    guide_model        a weaker model that v_null comes from (autoguidance, MAETok 4.5)

    Paper B.2: w = 2.3 with 128 tokens, 2.4 with 64. Config (REPA, which B.2 follows): the SDE, 250
    steps, the interval [0, 0.7]. Raises ValueError for settings that `check_sampler` refuses.
    """
    check_sampler(solver, num_steps, cfg_scale, guidance_interval, timestep_shift)
    x1 = next(noise)
    x = x1.double()
    null = torch.full_like(y, null_label)

    def velocity(x: Tensor, t: Tensor, guided: bool) -> Tensor:
        x = x.to(x1.dtype)
        t = x.new_full((len(x),), t.item())
        if not guided:
            return model(x, t, y).double()
        if guide_model is not None:
            v_y = model(x, t, y).double()
            v_null = guide_model(x, t, null).double()
        else:  # both in one call
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
            v_y, v_null = both.double().chunk(2)
        return v_null + cfg_scale * (v_y - v_null)

    # Times stay on the CPU, so that a GPU is never waited for.
    starts, ends = time_steps(solver, num_steps, timestep_shift)
    for i, (t, t_next) in enumerate(zip(starts, ends)):
        is_last = i + 1 == num_steps
        guided = cfg_scale > 1 and guidance_interval[0] <= t <= guidance_interval[1]
        dt = t_next - t  # negative
        v = velocity(x, t, guided)
        if solver == "sde":  # dx = (v - (g^2 / 2) score) dt + g dw, backward in time, g^2 = 2 t
            x = x + (v - t * score(x, v, t)) * dt
            if not is_last:
                x = x + torch.sqrt(2 * t * -dt) * next(noise).double()
        elif solver == "heun" and not is_last:
            v_next = velocity(x + v * dt, t_next, guided)
            x = x + (v + v_next) / 2 * dt
        else:
            x = x + v * dt
    return x


def check_sampler(
    solver: str,
    num_steps: int,
    cfg_scale: float,
    guidance_interval: tuple[float, float],
    timestep_shift: float = 1.0,
) -> None:
    """Raise ValueError, naming the value, for settings that `sample` cannot work with."""
    low, high = guidance_interval
    if solver not in ("euler", "heun", "sde"):
        raise ValueError(f"solver {solver!r} is not one of euler, heun, sde")
    if num_steps < 1:
        raise ValueError(f"{num_steps} sampling steps are too few; at least 1 is needed")
    if not math.isfinite(cfg_scale) or cfg_scale < 1:
        raise ValueError(f"guidance {cfg_scale} must be a finite number of at least 1 (1 is none)")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval [{low}, {high}] must be ordered and lie in [0, 1]")
    if not 0 < timestep_shift < math.inf:
        raise ValueError(f"shift {timestep_shift} must be a finite number above 0")
    if solver == "sde" and timestep_shift != 1:
        raise ValueError(
            f"shift {timestep_shift} is not possible with the solver sde; it must be 1"
        )


if __name__ == "__main__":
    model = SiT(num_tokens=16, latent_dim=8, num_classes=10, size="toy")
    noise = per_sample_noise(seed=0, indices=[0, 1], shape=(16, 8), device=torch.device("cpu"))
    latents = model.sample(noise, torch.tensor([3, 7]), num_steps=10, cfg_scale=2.0)
    print(f"latents {tuple(latents.shape)}, std {latents.std().item():.2f}")
