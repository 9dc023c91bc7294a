"""Every value a run depends on, and where it comes from: one dataclass, and dicts of what differs from it.

    Config    the toy's values, each with its help, its source and its bounds; every field is a flag of train.py
    PRESETS   scales: toy, s256, b256, b512, bl512
    RECIPES   methods: mactok, and the baselines kl (no mask, no alignment) and ae (the same without noise and KL)
    STAGES    what differs from the recipe in a stage on images

Sources: "paper" = stated in the paper; "config" = a hole in its text, filled from the public configuration it follows
(SoftVQ-VAE's, REPA's, SiT's); "ours" = our choice. The value in a source is the full-size one.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields, replace

import torch

from align import TEACHERS, VITS
from masking import MASKS
from plumbing.run import DEVICES, Parser, Processes, UserError, as_user_error
from sit import SIZES as SIT_SIZES
from sit import SiT
from tokenizer import POSTERIORS, SIZES, Tokenizer

DINOV2 = tuple(name for name in VITS if name.startswith("dinov2"))


def arg(default, help: str, source: str = "ours", least=None, most=math.inf, choices=None, fixes="tokenizer decoder sit"):
    """A field of Config; `fixes` names the stages whose checkpoints cannot be resumed with another value."""
    about = {"help": help, "source": source, "least": least, "most": most, "choices": choices, "fixes": fixes}
    return field(default=default, metadata=about)


# fmt: off
@dataclass(frozen=True)
class Config:
    # the run
    data: str = arg("", "folder of images, one sub-folder per class or flat (empty: the built-in shapes)", fixes="")
    out: str = arg("out", "folder for checkpoints, log.jsonl, result.json and pictures", fixes="")
    weights: str = arg("", "folder with official weight files (empty: torch hub's cache, filled from the internet)", fixes="")
    seed: int = arg(0, "of everything random", least=0, most=2**63 - 1)
    # the tokenizer
    image_size: int = arg(32, "pixels; images are centre-cropped", "paper 4.1: 256, 512", least=11, most=4096)  # SSIM's window
    patch_size: int = arg(0, "pixels; 0 = the largest power of two for which L divides N", "config: 16", least=0)
    tokens: int = arg(16, "L, latent tokens per image", "paper 4.1: 128, 64", least=1, most=2**16)
    channels: int = arg(16, "C, channels per token", "paper 4.1: 32", least=1, most=2**12)
    size: str = arg("toy", "of encoder and decoder", "paper 4.1: B; S, BL", choices=SIZES)
    posterior: str = arg("gaussian", "or point: no noise, no KL", "paper 3.1", choices=POSTERIORS)
    encoder_init: str = arg("none", "DINOv2 of its width that the encoder starts from", "paper 4.1", choices=("none", *DINOV2))
    teacher: str = arg("hog", "for alignment and semantic masks", "paper 4.1: DINOv2; ViT-B ours", choices=TEACHERS)
    mask: str = arg("mixed", "or latent, the paper's failing ablation", "paper 3.2", choices=MASKS)
    mask_ratio: float = arg(0.4, "M in m = max(0, U(-0.1, M))", "paper 4.1: 0.7; -0.1 config", least=0, most=1)
    kl_weight: float = arg(1e-6, "of KL, summed over L and C", "config: 1e-6", least=0)
    local_weight: float = arg(0.02, "of local alignment, eq. 3", "config: 0.1", least=0)
    global_weight: float = arg(0.02, "of global alignment, eq. 4", "config: 0.1", least=0)
    perceptual_weight: float = arg(0.0, "of LPIPS", "config: 1.0", least=0)
    adversarial_weight: float = arg(0.0, "of the adversarial loss, times the adaptive weight", "config: 0.2", least=0)
    discriminator_start: int = arg(400, "step at which it begins to train; its gradient reaches the decoder a quarter later",
                                   "config: 20000; the quarter ours", least=0)
    # its training
    learn: str = arg("all", "which part of the tokenizer is trained", choices=("all", "decoder"))
    batch_size: int = arg(16, "images per step over all processes", "paper B.1: 256; 128 at 512 px", least=1, most=2**20)
    micro_batch: int = arg(0, "images or latents per forward and process, the rest is accumulated; 0 = all", least=0, fixes="")
    lr: float = arg(2e-3, "peak, AdamW, cosine to zero", "config: 1e-4", least=0)
    warmup_steps: int = arg(50, "linear warm-up of lr", "paper B.1: 5000; 10000 at 512 px", least=0)
    tokenizer_steps: int = arg(3000, "steps of stage tokenizer", "paper B.1: 250000; 500000 at 512 px", least=1)
    decoder_steps: int = arg(150, "steps of stage decoder", "paper C.2: 10 epochs", least=1, fixes="decoder")
    ema_decay: float = arg(0.999, "of the weights that are evaluated, after a warm-up", "config: 0.9999", least=0, most=1)
    # SiT and its training
    sit: str = arg("toy", "size of SiT", "paper 4.1: XL", choices=SIT_SIZES, fixes="sit")
    sit_batch_size: int = arg(64, "latents per step over all processes", "paper B.2: 256", least=1, most=2**20, fixes="sit")
    sit_lr: float = arg(1e-3, "constant", "config: 1e-4", least=0, fixes="sit")
    sit_steps: int = arg(2000, "steps of stage sit", "paper 4.1: 4000000 for XL, 500000 for B", least=1, fixes="")
    sample_steps: int = arg(50, "solver steps of the samples at the end", "config: 250", least=1, fixes="")
    guidance: float = arg(3.0, "of the samples at the end, 1 = none", "paper B.2: 2.3, with 64 tokens 2.4", least=1, fixes="")
    # what it shows and keeps
    eval_images: int = arg(256, "images held out for PSNR and SSIM, at most a tenth of the data", least=2)
    eval_every: int = arg(600, "steps between evaluations of held-out images; the end is one", least=1, fixes="")
    log_every: int = arg(50, "steps between lines of log.jsonl", least=1, fixes="")
    save_every: int = arg(500, "steps between checkpoints", least=1, fixes="")
    workers: int = arg(0, "data-loading processes per training process", least=0, fixes="")
    compile: bool = arg(False, "torch.compile the transformer blocks", fixes="")

    def at(self, stage: str) -> "Config":
        """This config as a stage on images changes it: STAGES replaces values, and lr_scale multiplies lr."""
        changes = dict(STAGES[stage])
        return replace(self, lr=self.lr * changes.pop("lr_scale"), **changes)

    def steps(self, stage: str) -> int:
        return getattr(self, f"{stage}_steps")

    @property
    def uses_teacher(self) -> bool:
        return self.mask in ("mixed", "semantic") or self.local_weight + self.global_weight > 0

    @property
    def objective(self) -> str:
        """Eq. 7 in a line, with what is left out of it."""
        terms, off = self.loss_weights(), [name for name, weight in self.loss_weights().items() if not weight]
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
    eval_images=5_000, eval_every=10_000, log_every=100, save_every=5_000, workers=8,
)
AT_512 = dict(image_size=512, batch_size=128, micro_batch=8, warmup_steps=10_000, tokenizer_steps=500_000, decoder_steps=100_000)
PRESETS = {
    "toy": {},
    "s256": FULL | dict(size="S", encoder_init="dinov2_vits14"),
    "b256": FULL,
    "b512": FULL | AT_512,
    "bl512": FULL | AT_512 | dict(size="BL", tokens=64, guidance=2.4),
}

RECIPES = {
    "mactok": dict(mask="mixed", posterior="gaussian"),
    "kl": dict(mask="none", local_weight=0.0, global_weight=0.0),
    "ae": dict(mask="none", local_weight=0.0, global_weight=0.0, posterior="point", kl_weight=0.0),
}

STAGES = {  # in the order in which they are trained, each from the averaged weights of the one before
    "tokenizer": dict(lr_scale=1.0),
    "decoder": dict(  # section 4.1: the encoder is frozen and sees the whole image; lr / 10 is ours
        lr_scale=0.1, warmup_steps=0, learn="decoder", mask="none", kl_weight=0.0, local_weight=0.0, global_weight=0.0,
    ),
}
# fmt: on


def within(about: dict, kind: type):
    """What argparse reads a value with: the field's type, within the field's bounds."""

    def read(text: str):
        value = kind(text)
        if about["least"] is not None and not (about["least"] <= value <= about["most"] and value < math.inf):
            upper = f" and at most {about['most']}" if about["most"] < math.inf else ""
            raise argparse.ArgumentTypeError(f"is {text}; it must be at least {about['least']}{upper}")
        return value

    read.__name__ = kind.__name__  # argparse says it: "invalid int value"
    return read


def parse_config(arguments: list[str]) -> tuple[Config, argparse.Namespace]:
    """Command line -> resolved config, and what is no part of it: recipe, preset, stage, dry_run, device, precision.

    Flags win over the recipe, that over the preset.
    """
    parser = Parser(description="Train MacTok. The source of a value is in brackets, then the toy's value.")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="mactok", help="the method (default: mactok)")
    add("--preset", choices=PRESETS, help="the scale (default: toy, with --data b256)")
    add("--stage", default="all", choices=("all", *STAGES, "latents", "sit"))
    add("--dry_run", action="store_true", help="print files, parameters, memory, one measured step; then stop")
    add("--device", choices=DEVICES, help="default: cuda where there is one, else cpu")
    add("--precision", choices=("bf16", "float32"), help="of matrix products (default: bf16 on GPUs that have it)")
    for f in fields(Config):
        about, kind = f.metadata, {"action": "store_true"} if f.type is bool else {"type": within(f.metadata, f.type)}
        kind |= {"choices": about["choices"]} if about["choices"] else {}
        add(f"--{f.name}", default=None, help=f"{about['help']} [{about['source']}] {f.default}", **kind)
    options = parser.parse_args(arguments)
    given = {f.name: vars(options)[f.name] for f in fields(Config) if vars(options)[f.name] is not None}
    options.preset = options.preset or ("b256" if "data" in given else "toy")
    config = Config(**PRESETS[options.preset] | RECIPES[options.recipe] | given)
    if config.patch_size == 0:
        config = replace(config, patch_size=largest_patch(config.image_size, config.tokens))
    return config, options


def largest_patch(image_size: int, tokens: int) -> int:
    """The largest power of two p, up to an eighth of the image, for which L divides N = (image_size / p)^2; 1 if there is none."""
    candidates = [1 << k for k in range(10) if image_size % (1 << k) == 0 and 8 << k <= image_size]
    return max((p for p in candidates if (image_size // p) ** 2 % tokens == 0), default=1)


def check_config(config: Config, processes: Processes) -> None:
    """Raises UserError for values that contradict each other, before anything is read or written."""
    if config.posterior == "point" and config.kl_weight:
        raise UserError(f"--kl_weight is {config.kl_weight}, but a point posterior has no KL; use --kl_weight 0")
    if config.adversarial_weight and config.image_size % 16:
        raise UserError(f"--image_size is {config.image_size}; the discriminator's DINO needs a multiple of 16")
    if config.perceptual_weight and config.image_size < 16:
        raise UserError(f"--image_size is {config.image_size}; LPIPS needs at least 16")
    for prefix in ("", "sit_"):
        micro_batches(getattr(config, f"{prefix}batch_size"), config.micro_batch, processes, prefix)
    with as_user_error(), torch.device("meta"):
        Tokenizer.from_config(asdict(config))
        SiT(config.tokens, config.channels, 0, config.sit)
    if config.encoder_init != "none" and VITS[config.encoder_init][:3] != SIZES[config.size][0]:
        raise UserError(f"--encoder_init {config.encoder_init} is of another width or depth than the encoder of {config.size}")


def micro_batches(batch: int, micro_batch: int, processes: Processes, prefix: str = "") -> list[slice]:
    """This process's share of a global batch in pieces of micro_batch, whose gradients are added. UserError if it is uneven."""
    share, rest = divmod(batch, processes.world)
    if rest:
        raise UserError(f"--{prefix}batch_size {batch} cannot be divided among {processes.world} processes; use a multiple")
    micro = min(micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"--micro_batch {micro} does not divide the {share} rows that a process takes of --{prefix}batch_size {batch}"
        )
    return [slice(start, start + micro) for start in range(0, share, micro)]
