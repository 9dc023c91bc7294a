"""Every value a run depends on, and where it comes from: one dataclass, and dicts of what differs from it.

    Config         the toy's values, each with its help, its source and its bounds; every field is a flag of train.py
    PRESETS        scales: toy, s128, s256, b256, b512, bl512
    RECIPES        methods: mactok; beside it maetok, ldetok, aligntok; the baselines kl (no mask, no alignment) and ae (no KL)
    FULL_RECIPES   what the other papers change at full size, that is in all presets but toy and s128
    STAGES         the stages on images of each recipe, and what differs in them

Sources: "paper" = stated in MacTok's paper; "config" = a hole in its text, filled from the public configuration it follows
(SoftVQ-VAE's, REPA's, SiT's); "ours" = our choice. The value in a source is the full-size one. The dicts of the other three
systems hold what their papers state, with the section.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

import torch

from align import TEACHERS, VITS, build_tokenizer
from masking import MASKS
from plumbing.run import DEVICES, Parser, Processes, UserError, as_user_error, within
from sit import GENERATORS
from sit import SIZES as SIT_SIZES
from tokenizer import POSTERIORS, SIZES

METHODS = ("mactok", "maetok", "ldetok", "aligntok", "kl", "ae")


def arg(default, help: str, source: str = "ours", least=None, most=math.inf, choices=None, fixes="all"):
    """A field of Config; `fixes` says of which stage a checkpoint cannot be resumed with another value: all, one, or "" none."""
    about = {"help": help, "source": source, "least": least, "most": most, "choices": choices, "fixes": fixes}
    return field(default=default, metadata=about)


class Stage(NamedTuple):
    """A stage on images."""

    steps: tuple[str, float] = ("tokenizer_steps", 1.0)  # a step count of Config, and this stage's share of it
    learns: tuple[str, ...] = ("",)  # what of the tokenizer is trained: how the names of its parameters begin
    lr_scale: float = 1.0  # times lr
    fades: bool = False  # the mask ratio falls to 0
    changes: dict = {}  # values of Config


# fmt: off
@dataclass(frozen=True)
class Config:
    # the run
    data: str = arg("", "folder of images, one sub-folder per class or flat (empty: the built-in shapes)", fixes="")
    out: str = arg("out", "folder for checkpoints, log.jsonl, result.json and pictures", fixes="")
    weights: str = arg("", "folder with official weight files (empty: torch hub's cache, filled from the internet)", fixes="")
    seed: int = arg(0, "of everything random", least=0, most=2**63 - 1)
    recipe: str = arg("mactok", "the method, with its stages", choices=METHODS)
    # the tokenizer
    image_size: int = arg(32, "pixels; images are centre-cropped", "paper 4.1: 256, 512", least=11, most=4096)  # SSIM's window
    patch_size: int = arg(0, "pixels; 0 = the largest power of two for which L divides N", "config: 16", least=0)
    tokens: int = arg(16, "L, latent tokens per image; 0 = none, one latent per patch", "paper 4.1: 128, 64", least=0, most=2**16)
    channels: int = arg(16, "C, channels per token", "paper 4.1: 32", least=1, most=2**12)
    size: str = arg("toy", "of encoder and decoder", "paper 4.1: B; S, BL", choices=SIZES)
    posterior: str = arg("gaussian", "or point: no noise, no KL", "paper 3.1", choices=POSTERIORS)
    encoder_init: str = arg("none", "DINOv2 that the encoder starts from; teacher = the teacher is the encoder", "paper 4.1",
                            choices=("none", "teacher", *(name for name in VITS if name.startswith("dinov2"))))
    teacher: str = arg("hog", "for alignment and semantic masks", "paper 4.1: DINOv2; ViT-B ours", choices=TEACHERS)
    mask: str = arg("mixed", "or latent, the paper's failing ablation", "paper 3.2", choices=MASKS)
    mask_ratio: float = arg(0.4, "M in m = max(0, U(least, M))", "paper 4.1: 0.7", least=0, most=1)
    mask_least: float = arg(-0.1, "the least of it", "config: l-DeTok", least=-1, most=1)
    latent_noise: float = arg(0.0, "gamma of l-DeTok's noise on z", least=0)
    kl_weight: float = arg(1e-6, "of KL, summed over L and C", "config: 1e-6", least=0)
    local_weight: float = arg(0.02, "of local alignment, eq. 3", "config: 0.1", least=0)
    global_weight: float = arg(0.02, "of global alignment, eq. 4", "config: 0.1", least=0)
    features_weight: float = arg(0.0, "of MAETok's decoder of the teacher's features", least=0)
    hog_weight: float = arg(0.0, "of MAETok's decoder of HOG features", least=0)
    preservation_weight: float = arg(0.0, "of AlignTok's distance from the latents of the stage before", least=0)
    perceptual_weight: float = arg(0.0, "of LPIPS", "config: 1.0", least=0)
    adversarial_weight: float = arg(0.0, "of the adversarial loss, times the adaptive weight", "config: 0.2", least=0)
    discriminator_start: int = arg(400, "step at which it begins to train; its gradient reaches the decoder a quarter later",
                                   "config: 20000; the quarter ours", least=0)
    # its training
    batch_size: int = arg(16, "images per step over all processes", "paper B.1: 256; 128 at 512 px", least=1, most=2**20)
    micro_batch: int = arg(0, "images or latents per forward and process, the rest is accumulated; 0 = all", least=0, fixes="")
    lr: float = arg(2e-3, "peak, AdamW, cosine to zero", "config: 1e-4", least=0)
    warmup_steps: int = arg(50, "linear warm-up of lr", "paper B.1: 5000; 10000 at 512 px", least=0)
    tokenizer_steps: int = arg(3000, "steps of all stages before the last one", "paper B.1: 250000; 500000 at 512 px", least=1)
    decoder_steps: int = arg(150, "steps of stage decoder", "paper C.2: 10 epochs", least=1, fixes="decoder")
    ema_decay: float = arg(0.999, "of the weights that are evaluated, after a warm-up", "config: 0.9999", least=0, most=1)
    # SiT and its training
    generator: str = arg("sit", "transformer on the latents", "paper 4.1: both", choices=GENERATORS, fixes="sit")
    sit: str = arg("toy", "its size", "paper 4.1: XL", choices=SIT_SIZES, fixes="sit")
    sit_batch_size: int = arg(32, "latents per step over all processes", "paper B.2: 256", least=1, most=2**20, fixes="sit")
    sit_lr: float = arg(1e-3, "constant", "config: 1e-4", least=0, fixes="sit")
    sit_steps: int = arg(3500, "steps of stage sit", "paper 4.1: 4000000 for XL, 500000 for B", least=1, fixes="")
    sample_steps: int = arg(50, "solver steps of the samples at the end", "config: 250", least=1, fixes="")
    guidance: float = arg(3.0, "of the samples at the end, 1 = none", "paper B.2: 2.3, with 64 tokens 2.4", least=1, fixes="")
    # what it shows and keeps
    eval_images: int = arg(256, "images held out for PSNR and SSIM, at most a tenth of the data", least=2)
    log_every: int = arg(50, "steps between lines of log.jsonl", least=1, fixes="")
    save_every: int = arg(500, "steps between checkpoints; on images with an evaluation of held-out ones", least=1, fixes="")
    workers: int = arg(0, "data-loading processes per training process", least=0, fixes="")

    @property
    def stages(self) -> dict[str, Stage]:
        return STAGES[self.recipe]

    def at(self, stage: str) -> "Config":
        """This config as a stage on images changes it."""
        return replace(self, lr=self.lr * self.stages[stage].lr_scale, **self.stages[stage].changes)

    def steps(self, stage: str) -> int:
        name, share = self.stages[stage].steps if stage in self.stages else ("sit_steps", 1)
        return round(share * getattr(self, name))

    @property
    def encoder_file(self) -> str:
        """The official file that the encoder starts from, if it is one."""
        return self.teacher if self.encoder_init == "teacher" else self.encoder_init

    @property
    def uses_teacher(self) -> bool:
        return self.mask in ("mixed", "semantic") or self.local_weight + self.global_weight + self.features_weight > 0

    @property
    def objective(self) -> str:
        """Eq. 7 in a line, with what is left out of the recipe's own."""
        terms, full = self.loss_weights(), Config(**FULL | RECIPES[self.recipe] | FULL_RECIPES[self.recipe]).loss_weights()
        off = [name for name, weight in full.items() if weight and not terms[name]]
        on = " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight)
        return on + (f", teacher {self.teacher}" if self.uses_teacher else "") + (f"; off: {', '.join(off)}" if off else "")

    def loss_weights(self) -> dict[str, float]:
        """{term: weight} of the objective (eq. 7): MSE, and each field NAME_weight."""
        names = [f.name for f in fields(self) if f.name.endswith("_weight")]
        return {"mse": 1.0} | {name.removesuffix("_weight"): getattr(self, name) for name in names}


FULL = dict(
    image_size=256, patch_size=16, tokens=128, channels=32, size="B", encoder_init="dinov2_vitb14", teacher="dinov2_vitb14",
    mask_ratio=0.7, local_weight=0.1, global_weight=0.1, perceptual_weight=1.0, adversarial_weight=0.2, discriminator_start=20_000,
    batch_size=256, micro_batch=32, lr=1e-4, warmup_steps=5_000, tokenizer_steps=250_000, decoder_steps=50_000, ema_decay=0.9999,
    sit="XL", sit_batch_size=256, sit_lr=1e-4, sit_steps=4_000_000, sample_steps=250, guidance=2.3,
    eval_images=5_000, log_every=100, save_every=5_000, workers=8,
)
AT_512 = dict(image_size=512, batch_size=128, micro_batch=8, warmup_steps=10_000, tokenizer_steps=500_000, decoder_steps=100_000)
PRESETS = {
    "toy": {},
    "s128": FULL | dict(  # ours: one consumer GPU and your own photographs, on paper in about an hour
        image_size=128, tokens=64, size="S", encoder_init="dinov2_vits14", teacher="dinov2_vits14", discriminator_start=5_000,
        batch_size=64, micro_batch=32, warmup_steps=1_000, tokenizer_steps=20_000, decoder_steps=2_000, ema_decay=0.999,
        sit="S", sit_steps=30_000, sample_steps=100, guidance=2.4, eval_images=500, save_every=1_000,
    ),
    "s256": FULL | dict(size="S", encoder_init="dinov2_vits14"),
    "b256": FULL,
    "b512": FULL | AT_512,
    "bl512": FULL | AT_512 | dict(size="BL", tokens=64, guidance=2.4),
}
TOY_TOKENS = {  # by L: the toy with more tokens than its 16, in minutes all the same: small batches learn most in them (ours)
    64: dict(channels=4, sit_batch_size=16),
    128: dict(channels=4, batch_size=4, tokenizer_steps=6_000, sit_batch_size=8, sit_steps=9_000, sample_steps=25),
}

NO_ALIGNMENT = dict(local_weight=0.0, global_weight=0.0)
POINT = dict(posterior="point", kl_weight=0.0)
RECIPES = {
    "mactok": dict(mask="mixed", posterior="gaussian"),
    "maetok": NO_ALIGNMENT | POINT | dict(mask="random", mask_least=0.4, mask_ratio=0.6, features_weight=1.0, hog_weight=1.0),
    "ldetok": NO_ALIGNMENT | dict(tokens=0, channels=4, sit_batch_size=16, mask="dropped", mask_ratio=0.7, latent_noise=3.0),
    "aligntok": NO_ALIGNMENT | POINT | dict(
        tokens=0, channels=8, sit_batch_size=16, encoder_init="teacher", mask="none", preservation_weight=1.0,
    ),
    "kl": NO_ALIGNMENT | dict(mask="none"),
    "ae": NO_ALIGNMENT | POINT | dict(mask="none"),
}
FULL_RECIPES = {name: {} for name in RECIPES} | {
    "maetok": dict(  # 4.1, B.1, C.2; SigLIP features are left out
        encoder_init="none", teacher="dinov2_vitl14", adversarial_weight=0.4, discriminator_start=30_000, batch_size=512,
        warmup_steps=10_000, tokenizer_steps=500_000, decoder_steps=50_000, guidance=1.9,
    ),
    "ldetok": dict(  # 4, A.1, A.2: 200 epochs, the discriminator from the 100th
        encoder_init="none", channels=16, adversarial_weight=0.1, discriminator_start=125_000, batch_size=1024, lr=4e-4,
        warmup_steps=62_500, decoder_steps=125_000, sit="B", sit_batch_size=1024, sit_lr=2e-4, sit_steps=125_000,
    ),
    "aligntok": dict(  # A: 6 + 11 + 5 epochs; the adversarial weight is VA-VAE's
        teacher="dinov2_vitl14", channels=32, adversarial_weight=0.5, discriminator_start=5_000, batch_size=64, warmup_steps=0,
        tokenizer_steps=340_000, decoder_steps=100_000, generator="lightningdit", sit_steps=80_000,
    ),
}
FULL_GENERATORS = {  # 4.1, B.2; lr config: LightningDiT
    "sit": {},
    "lightningdit": dict(sit_batch_size=1024, sit_lr=2e-4, sit_steps=400_000, guidance=2.5),
}

DECODER = Stage(  # section 4.1: the encoder is frozen and sees the whole image; lr / 10 is ours
    ("decoder_steps", 1.0), ("decoder.",), 0.1, changes=NO_ALIGNMENT | dict(
        warmup_steps=0, mask="none", kl_weight=0.0, latent_noise=0.0, features_weight=0.0, hog_weight=0.0, preservation_weight=0.0,
    )
)
STAGES = {name: {"tokenizer": Stage(), "decoder": DECODER} for name in RECIPES} | {  # each from the averages of the one before
    "maetok": {  # 3.3, 4.1: the ratio falls from 0.6 to 0
        "tokenizer": Stage(),
        "decoder": DECODER._replace(fades=True, changes=DECODER.changes | dict(mask="random", mask_least=0.6, mask_ratio=0.6)),
    },
    "aligntok": {  # 3.2, A: latent alignment, perceptual alignment, decoder refinement
        "adapter": Stage(
            ("tokenizer_steps", 6 / 17), ("encoder.adapter.", "encoder.to_moments.", "decoder."),
            changes=dict(preservation_weight=0.0),
        ),
        "joint": Stage(("tokenizer_steps", 11 / 17), lr_scale=0.1, changes=dict(warmup_steps=0)),
        "decoder": DECODER._replace(lr_scale=1.0),
    },
}
# fmt: on


def parse_config(arguments: list[str]) -> tuple[Config, argparse.Namespace]:
    """Command line -> resolved config, and what is no part of it: preset, stage, dry_run, device, precision, compile.

    Flags win over the recipe, that over the generator's values, those over the preset.
    """
    parser = Parser(description="Train MacTok. The source of a value is in brackets, then the toy's value.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the scale (default: toy, with --data b256)")
    add("--stage", default="all", help="one of the recipe's stages, latents or sit (default: all)")
    add("--dry_run", action="store_true", help="print files, parameters, memory, one measured step; then stop")
    add("--device", choices=DEVICES, help="default: cuda where there is one, else cpu")
    add("--precision", choices=("bf16", "float32"), help="of matrix products (default: bf16 on GPUs that have it)")
    add("--compile", action="store_true", help="torch.compile the transformer blocks")
    for f in fields(Config):
        about, reader = f.metadata, within(f.type, f.metadata["least"], f.metadata["most"])
        add(f"--{f.name}", help=f"{about['help']} [{about['source']}] {f.default}", type=reader, choices=about["choices"])
    options = parser.parse_args(arguments)
    given = {f.name: vars(options)[f.name] for f in fields(Config) if vars(options)[f.name] is not None}
    options.preset = options.preset or ("b256" if "data" in given else "toy")
    recipe, full = given.get("recipe", "mactok"), {}
    if options.preset == "toy":
        full = TOY_TOKENS.get(given.get("tokens"), {})
    elif options.preset != "s128":
        full = FULL_RECIPES[recipe]
        full = FULL_GENERATORS[(full | given).get("generator", "sit")] | full
    config = Config(**PRESETS[options.preset] | RECIPES[recipe] | full | given)
    if options.stage not in (stages := ("all", *config.stages, "latents", "sit")):
        raise UserError(f"--stage {options.stage}: recipe {config.recipe} has the stages {', '.join(stages)}")
    if config.patch_size == 0:  # the largest power of two up to an eighth of the image, for which L divides N; 1 if there is none
        sizes = [1 << k for k in range(10) if config.image_size % (1 << k) == 0 and 8 << k <= config.image_size]
        fitting = [p for p in sizes if (config.image_size // p) ** 2 % max(1, config.tokens) == 0]
        config = replace(config, patch_size=max(fitting, default=1))
    return config, options


def check_config(config: Config, processes: Processes) -> None:
    """Raises UserError for values that contradict each other, before anything is read or written."""
    if config.posterior == "point" and config.kl_weight:
        raise UserError(f"--kl_weight is {config.kl_weight}, but a point posterior has no KL; use --kl_weight 0")
    heads = config.local_weight + config.global_weight + config.features_weight + config.hog_weight
    if config.mask == "dropped" and (config.tokens or heads or config.encoder_init == "teacher"):
        raise UserError("--mask dropped leaves out latents of patches: it needs --tokens 0, no loss on them, and our encoder")
    if config.encoder_init == "teacher" and config.tokens:
        raise UserError(f"--tokens is {config.tokens}, but a teacher as the encoder has one latent per patch; use --tokens 0")
    if config.at(first := next(iter(config.stages))).preservation_weight:
        raise UserError(f"--preservation_weight {config.preservation_weight}: stage {first} has no stage before it to preserve")
    if config.adversarial_weight and config.image_size % 16:
        raise UserError(f"--image_size is {config.image_size}; the discriminator's DINO needs a multiple of 16")
    if config.perceptual_weight and config.image_size < 16:
        raise UserError(f"--image_size is {config.image_size}; LPIPS needs at least 16")
    for prefix in ("", "sit_"):
        micro_batches(getattr(config, f"{prefix}batch_size"), config.micro_batch, processes, prefix)
    with as_user_error(), torch.device("meta"):
        tokenizer = build_tokenizer(asdict(config))
    patches = f"{tokenizer.num_patches} patches of --patch_size {config.patch_size}"
    if tokenizer.tokens > tokenizer.num_patches:
        raise UserError(f"--tokens {config.tokens} is more than the {patches}; use fewer tokens or smaller patches")
    if config.local_weight and tokenizer.num_patches % tokenizer.tokens:
        divided = f"--tokens {config.tokens} does not divide the {patches}"
        raise UserError(f"{divided}, and local alignment (eq. 3) gives each latent as many; use a divisor or --local_weight 0")
    if config.encoder_init in VITS and VITS[config.encoder_init][:3] != SIZES[config.size][0]:
        raise UserError(f"--encoder_init {config.encoder_init} is of another width or depth than the encoder of {config.size}")


def micro_batches(batch: int, micro_batch: int, processes: Processes, prefix: str = "") -> list[slice]:
    """This process's rows of a global batch in pieces of micro_batch, whose gradients are added. UserError if they are uneven."""
    share, rest = divmod(batch, processes.world)
    if rest:
        raise UserError(f"--{prefix}batch_size {batch} cannot be divided among {processes.world} processes; use a multiple")
    micro = min(micro_batch or share, share)
    if share % micro:
        raise UserError(f"--micro_batch {micro} does not divide a process's {share} rows of --{prefix}batch_size {batch}")
    first = share * processes.rank
    return [slice(start, start + micro) for start in range(first, first + share, micro)]
