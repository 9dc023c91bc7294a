"""Every value that a run depends on, with its source: one dataclass, and dicts of overrides.

    Config            all values; the defaults are the toy's. Every field is a flag of train.py
    PRESETS           scales: toy, s128, s256, b256, b512, bl512
    TOY_TOKENS        values of the toy with 64 and with 128 latent tokens
    RECIPES           methods: mactok, maetok, ldetok, aligntok, and two baselines, kl and ae
    TOY_RECIPES       sizes of these methods in the toy
    FULL_RECIPES      values of the other papers, in all presets but toy and s128
    FULL_GENERATORS   values of the generators, likewise
    STAGES            the image stages of each recipe, and which values differ in them

A source says where a full-size value comes from. "paper": MacTok's paper (arXiv 2603.29634) states
it. "config": the paper does not state it, and it comes from the public configuration that the paper
follows (SoftVQ-VAE's, REPA's, SiT's). "ours": our choice. The dicts of the other three systems hold
what their papers state, with the section. options.py turns a command line into a Config.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from align import TEACHERS, VIT_CONFIGS
from masking import MASKS
from sit import GENERATOR_SIZES, GENERATORS
from tokenizer import BOTTLENECKS, MODEL_SIZES

OPTIMIZERS = ("adamw", "muon")
METHODS = ("mactok", "maetok", "ldetok", "aligntok", "kl", "ae")
BOTTLENECK_LOSSES = {name for each in BOTTLENECKS.values() for name in each.loss_names}
DINOV2_NAMES = tuple(name for name in VIT_CONFIGS if name.startswith("dinov2"))


def option(
    default,
    source: str,
    help: str,
    min: float | None = None,
    max: float = math.inf,
    choices=None,
    flag: str | None = None,
    resume_scope: str = "all",
):
    """A field of Config.

    source        "paper", "config" or "ours", and the full-size value
    min, max      bounds of a number
    flag          its flag on the command line, if that is shorter than the field's name
    resume_scope  which checkpoints cannot be resumed with another value: those of "all" stages, of
                  one stage, or of "none"
    """
    metadata = dict(
        source=source,
        help=help,
        min=min,
        max=max,
        choices=choices,
        flag=flag,
        resume_scope=resume_scope,
    )
    return field(default=default, metadata=metadata)


def flag_of(field) -> str:
    """A field's flag on the command line, without the dashes."""
    return field.metadata["flag"] or field.name


class Stage(NamedTuple):
    """An image stage, which trains the tokenizer or a part of it on images."""

    steps_field: str = "tokenizer_steps"  # the field of Config that counts its steps
    steps_share: float = 1.0  # how much of that count this stage takes
    trainable: tuple[str, ...] = ("",)  # prefixes of parameters that are trained; "" is all
    lr_scale: float = 1.0  # factor on lr
    anneal_mask_ratio: bool = False  # whether the mask ratio falls to 0 during the stage
    overrides: dict = {}  # values of Config in this stage, which also win over flags


# fmt: off
@dataclass(frozen=True)
class Config:
    """The resolved values of a run. The first value of each option is the toy's."""

    # The run.
    data_dir: str = option("", "ours", flag="data", resume_scope="none",
        help="folder of images, one sub-folder per class or flat (empty: the built-in shapes)")
    out_dir: str = option("out", "ours", flag="out", resume_scope="none",
        help="folder for checkpoints, log.jsonl, result.json and pictures")
    weights_dir: str = option("", "ours", flag="weights", resume_scope="none",
        help="folder with official weight files (empty: torch hub's cache, into which they go)")
    seed: int = option(0, "ours", min=0, max=2**63 - 1,
        help="seed of everything random")
    recipe: str = option("mactok", "ours", choices=METHODS,
        help="the method, with its stages")
    tokenizer_run: str = option("", "ours", flag="tokenizer", resume_scope="none",
        help="a run or exported file whose tokenizer and values are taken; only latents and "
        "generator are then made (empty: train a tokenizer)")

    # The tokenizer.
    image_size: int = option(32, "paper 4.1: 256, 512", min=11, max=4096,  # SSIM's window has 11 px
        help="side in pixels to which images are resized and center-cropped")
    patch_size: int = option(0, "config: 16", min=0,
        help="side of a patch in pixels (0: the largest with which there are 8 to 16 patches per "
        "side, and L divides their number N)")
    num_latent_tokens: int = option(16, "paper 4.1: 128, 64", min=0, max=2**16, flag="tokens",
        help="L, latent tokens per image (0: one latent per patch)")
    latent_dim: int = option(16, "paper 4.1: 32", min=1, max=2**12, flag="channels",
        help="C, channels of a latent token")
    tokenizer_size: str = option("toy", "paper 4.1: B; S, BL", choices=MODEL_SIZES, flag="size",
        help="size of encoder and decoder")
    bottleneck: str = option("gaussian", "paper 3.1", choices=BOTTLENECKS,
        help="what lies between encoder and decoder; deterministic has no noise and no KL")
    encoder_init: str = option("none", "paper 4.1", choices=("none", "teacher", *DINOV2_NAMES),
        help="DINOv2 that the encoder starts from; teacher: the encoder is the teacher itself")
    teacher: str = option("hog", "paper 4.1: DINOv2; ViT-B ours",
        help="frozen network for alignment and semantic masks: one of "
        f"{', '.join(TEACHERS)}, or a file that lab.py teacher wrote")
    mask: str = option("mixed", "paper 3.2", choices=MASKS,
        help="which patches are hidden from the encoder")
    mask_ratio_max: float = option(0.4, "paper 4.1: 0.7", min=0, max=1, flag="mask_ratio",
        help="M in the mask ratio max(0, U(min, M)) of an image")
    mask_ratio_min: float = option(-0.1, "config: l-DeTok", min=-1, max=1,
        help="the lower end of that range")
    latent_mask: bool = option(False, "paper fig. 1",
        help="1: hide latents from the decoder, the ablation that the paper shows to fail")
    drop_masked: bool = option(False, "ours",
        help="1: leave hidden patches out of the encoder, as l-DeTok does")
    latent_noise: float = option(0.0, "ours", min=0,
        help="gamma, the scale of l-DeTok's noise on latents")

    # The objective (eq. 7). Each loss NAME has the weight NAME_weight.
    kl_weight: float = option(1e-6, "config: 1e-6", min=0,
        help="weight of the KL divergence, which is summed over tokens and channels")
    local_weight: float = option(0.02, "config: 0.1", min=0,
        help="weight of local alignment, eq. 3")
    global_weight: float = option(0.02, "config: 0.1", min=0,
        help="weight of global alignment, eq. 4")
    features_weight: float = option(0.0, "ours", min=0,
        help="weight of MAETok's decoder of the teacher's features")
    hog_weight: float = option(0.0, "ours", min=0,
        help="weight of MAETok's decoder of HOG features")
    preservation_weight: float = option(0.0, "ours", min=0,
        help="weight of AlignTok's distance from the latents of the stage before")
    perceptual_weight: float = option(0.0, "config: 1.0", min=0,
        help="weight of LPIPS")
    adversarial_weight: float = option(0.0, "config: 0.2", min=0,
        help="weight of the adversarial loss, times the adaptive weight")
    discriminator_start: int = option(400, "config: 20000; the quarter ours", min=0,
        help="step, counted over all image stages, from which the discriminator trains; from 1.25 "
        "times it on, its gradient reaches the decoder")

    # Training on images.
    batch_size: int = option(16, "paper B.1: 256; 128 at 512 px", min=1, max=2**20,
        help="images per step, over all processes")
    micro_batch: int = option(0, "ours", min=0, resume_scope="none",
        help="images per forward pass and process, whose gradients are added up (0: all)")
    flip: bool = option(True, "paper B.1",
        help="1: mirror images at random; 0 for text, arrows and the like")
    optimizer: str = option("muon", "paper B.1: adamw", choices=OPTIMIZERS,
        help="of the tokenizer; muon: Muon for the matrices of its blocks, AdamW for the rest")
    lr: float = option(4e-3, "config: 1e-4", min=0,
        help="peak learning rate, which falls to zero along a cosine")
    warmup_steps: int = option(50, "paper B.1: 5000; 10000 at 512 px", min=0,
        help="steps of linear warm-up to lr")
    tokenizer_steps: int = option(800, "paper B.1: 250000; 500000 at 512 px", min=1,
        help="steps of all image stages but the last")
    decoder_steps: int = option(100, "paper C.2: 10 epochs", min=1, resume_scope="decoder",
        help="steps of the decoder stage")
    ema_decay: float = option(0.999, "config: 0.9999", min=0, max=1,
        help="decay of the averaged weights, after a warm-up")

    # The generator and its training.
    generator: str = option("sit", "paper 4.1: both", choices=GENERATORS, resume_scope="generator",
        help="the transformer that generates latents")
    generator_size: str = option("toy", "paper 4.1: XL", choices=GENERATOR_SIZES,
        resume_scope="generator", help="size of the generator")
    generator_batch_size: int = option(32, "paper B.2: 256", min=1, max=2**20,
        resume_scope="generator", help="latents per step, over all processes")
    generator_micro_batch: int = option(0, "ours", min=0, resume_scope="none",
        help="latents per forward pass and process (0: all)")
    generator_lr: float = option(3e-3, "config: 1e-4", min=0, resume_scope="generator",
        help="constant learning rate of the generator")
    generator_steps: int = option(1500, "paper 4.1: 4000000 for XL, 500000 for B", min=1,
        resume_scope="none", help="steps of the generator stage")
    sampling_steps: int = option(50, "config: 250", min=1, resume_scope="none",
        help="solver steps of the samples")
    cfg_scale: float = option(2.3, "paper B.2: 2.3; 2.4 with 64 tokens", min=1, flag="guidance",
        resume_scope="none", help="guidance scale of the samples (1: none)")

    # What a run keeps and shows.
    eval_images: int = option(256, "ours", min=2,
        help="images that are held out for evaluation, at most a tenth of the data")
    log_every: int = option(50, "ours", min=1, resume_scope="none",
        help="steps between lines of log.jsonl")
    save_every: int = option(250, "ours", min=1, resume_scope="none",
        help="steps between checkpoints, and between evaluations of image stages")
    sample_every: int = option(0, "ours", min=0, resume_scope="none",
        help="steps between evaluations of samples (0: only at the end of the generator stage)")
    num_workers: int = option(0, "ours", min=0, flag="workers", resume_scope="none",
        help="data-loading processes per training process")
    # fmt: on

    @property
    def stages(self) -> dict[str, Stage]:
        """The image stages of this run, in order: none with another run's tokenizer."""
        return {} if self.tokenizer_run else STAGES[self.recipe]

    @property
    def first_stage(self) -> str:
        return next(iter(STAGES[self.recipe]))

    def for_stage(self, stage: str) -> "Config":
        """This config as an image stage changes it."""
        settings = STAGES[self.recipe][stage]
        return replace(self, lr=self.lr * settings.lr_scale, **settings.overrides)

    def total_steps(self, stage: str) -> int:
        """How many steps a stage takes."""
        if stage == "generator":
            return self.generator_steps
        settings = self.stages[stage]
        return round(settings.steps_share * getattr(self, settings.steps_field))

    @property
    def grid_size(self) -> int:
        """The side of the patch grid, sqrt(N)."""
        return self.image_size // self.patch_size

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher looks at the images in training."""
        uses_features = self.local_weight + self.global_weight + self.features_weight > 0
        return uses_features or MASKS[self.mask].needs_scores

    @property
    def teacher_file(self) -> str:
        """The file of a trained teacher, or "" if the teacher is one of align.TEACHERS."""
        return "" if self.teacher in TEACHERS else self.teacher

    @property
    def needs_teacher_file(self) -> bool:
        """Whether that file must be there: not if another run's tokenizer is used."""
        return self.teacher not in TEACHERS and bool(self.stages)

    @property
    def encoder_weights(self) -> str:
        """What the encoder starts from: "none", the name of a DINOv2, or any --teacher."""
        return self.teacher if self.encoder_init == "teacher" else self.encoder_init

    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss in the objective (eq. 7), by name.

        Those of other bottlenecks than this config's are left out.
        """
        names = [f.name.removesuffix("_weight") for f in fields(self) if f.name.endswith("_weight")]
        foreign = BOTTLENECK_LOSSES - set(BOTTLENECKS[self.bottleneck].loss_names)
        weights = {name: getattr(self, f"{name}_weight") for name in names if name not in foreign}
        return {"mse": 1.0} | weights

    def describe_objective(self) -> str:
        """Eq. 7 in one line, and which terms of the full-size recipe are switched off."""
        weights = self.loss_weights()
        full_values = BASE_256 | RECIPES[self.recipe] | FULL_RECIPES[self.recipe]
        full_weights = Config(**full_values).loss_weights()
        line = " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
        if self.needs_teacher:
            line += f", teacher {self.teacher}"
        off = [name for name, weight in full_weights.items() if weight and not weights.get(name)]
        if off:
            line += f"; off: {', '.join(off)}"
        return line


# What a tokenizer is built from.
TOKENIZER_FIELDS = (
    "recipe", "image_size", "patch_size", "num_latent_tokens", "latent_dim", "tokenizer_size",
    "bottleneck", "encoder_init", "teacher",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Scales. Each dict holds what differs from the defaults above.

# fmt: off
BASE_256 = dict(
    image_size=256, patch_size=16, num_latent_tokens=128, latent_dim=32, tokenizer_size="B",
    encoder_init="dinov2_vitb14", teacher="dinov2_vitb14", mask_ratio_max=0.7,
    local_weight=0.1, global_weight=0.1, perceptual_weight=1.0, adversarial_weight=0.2,
    discriminator_start=20_000, batch_size=256, micro_batch=32,
    optimizer="adamw", lr=1e-4, warmup_steps=5_000,
    tokenizer_steps=250_000, decoder_steps=50_000, ema_decay=0.9999,
    generator_size="XL", generator_batch_size=256, generator_micro_batch=32,
    generator_lr=1e-4, generator_steps=4_000_000,
    sampling_steps=250,
    eval_images=5_000, log_every=100, save_every=10_000, sample_every=100_000, num_workers=8,
)
AT_512 = dict(
    image_size=512, batch_size=128, micro_batch=8, warmup_steps=10_000,
    tokenizer_steps=500_000, decoder_steps=100_000,
)
PRESETS = {
    "toy": {},
    "s128": BASE_256 | dict(  # ours: one consumer GPU and your own photographs
        image_size=128, num_latent_tokens=64, tokenizer_size="S",
        encoder_init="dinov2_vits14", teacher="dinov2_vits14",
        discriminator_start=5_000, batch_size=64, micro_batch=32, warmup_steps=1_000,
        tokenizer_steps=20_000, decoder_steps=2_000, ema_decay=0.999,
        generator_size="S", generator_micro_batch=0, generator_steps=30_000,
        sampling_steps=100, cfg_scale=2.4,
        eval_images=500, save_every=1_000, sample_every=5_000,
    ),
    "s256": BASE_256 | dict(tokenizer_size="S", encoder_init="dinov2_vits14"),
    "b256": BASE_256,
    "b512": BASE_256 | AT_512,
    "bl512": BASE_256 | AT_512 | dict(tokenizer_size="BL", num_latent_tokens=64, cfg_scale=2.4),
}

# The toy with more latent tokens, by their number. Small batches learn most in few minutes (ours;
# guidance: paper B.2).
TOY_TOKENS = {
    64: dict(
        latent_dim=4, tokenizer_steps=1_000,
        generator_batch_size=16, generator_lr=2e-3, generator_steps=3_500,
        sampling_steps=25, cfg_scale=2.4,
    ),
    128: dict(
        latent_dim=4, batch_size=4, tokenizer_steps=2_000,
        generator_batch_size=8, generator_lr=2e-3, generator_steps=5_000, sampling_steps=25,
    ),
}

# --------------------------------------------------------------------------------------------------
# Methods.

NO_ALIGNMENT = dict(local_weight=0.0, global_weight=0.0)
PLAIN_AE = dict(bottleneck="deterministic", kl_weight=0.0)
RECIPES = {
    "mactok": dict(mask="mixed", bottleneck="gaussian"),
    "maetok": NO_ALIGNMENT | PLAIN_AE | dict(
        mask="random", mask_ratio_min=0.4, mask_ratio_max=0.6, features_weight=1.0, hog_weight=1.0,
    ),
    "ldetok": NO_ALIGNMENT | dict(
        num_latent_tokens=0, mask="random", mask_ratio_max=0.7, drop_masked=True, latent_noise=3.0,
    ),
    "aligntok": NO_ALIGNMENT | PLAIN_AE | dict(
        num_latent_tokens=0, encoder_init="teacher", mask="none", preservation_weight=1.0,
    ),
    "kl": NO_ALIGNMENT | dict(mask="none"),  # neither masks nor alignment
    "ae": NO_ALIGNMENT | PLAIN_AE | dict(mask="none"),  # also without noise and KL
}
TOY_RECIPES = {  # ours: latents on the patch grid have fewer channels, and SiT smaller batches
    "ldetok": dict(
        latent_dim=4, generator_batch_size=16, generator_lr=2e-3, generator_steps=3_000,
    ),
    "aligntok": dict(
        latent_dim=8, generator_batch_size=16, generator_lr=2e-3, generator_steps=3_000,
    ),
}
FULL_RECIPES = {
    "mactok": {},
    "maetok": dict(  # its sections 4.1, B.1, C.2; SigLIP features are left out
        encoder_init="none", teacher="dinov2_vitl14", adversarial_weight=0.4,
        discriminator_start=30_000, batch_size=512, warmup_steps=10_000,
        tokenizer_steps=500_000, decoder_steps=50_000, cfg_scale=1.9,
    ),
    "ldetok": dict(  # its sections 4, A.1, A.2: 200 epochs, the discriminator from the 100th on
        encoder_init="none", latent_dim=16, adversarial_weight=0.1, discriminator_start=125_000,
        batch_size=1024, lr=4e-4, warmup_steps=62_500, decoder_steps=125_000,
        generator_size="B", generator_batch_size=1024, generator_lr=2e-4, generator_steps=125_000,
    ),
    "aligntok": dict(  # its section A: 6 + 11 + 5 epochs; the adversarial weight is VA-VAE's
        teacher="dinov2_vitl14", latent_dim=32, adversarial_weight=0.5, discriminator_start=5_000,
        batch_size=64, warmup_steps=0, tokenizer_steps=340_000, decoder_steps=100_000,
        generator="lightningdit", generator_steps=80_000,
    ),
    "kl": {},
    "ae": {},
}
FULL_GENERATORS = {  # paper 4.1, B.2; the learning rate is LightningDiT's config
    "sit": {},
    "lightningdit": dict(
        generator_batch_size=1024, generator_lr=2e-4, generator_steps=400_000, cfg_scale=2.5,
    ),
}

# --------------------------------------------------------------------------------------------------
# Image stages. Each starts from the averaged weights of the one before.

# Paper 4.1: the encoder is frozen and sees whole images. The factor on the learning rate is ours.
DECODER_FINETUNE = Stage(
    steps_field="decoder_steps", trainable=("decoder.",), lr_scale=0.1,
    overrides=NO_ALIGNMENT | {f"{name}_weight": 0.0 for name in BOTTLENECK_LOSSES} | dict(
        warmup_steps=0, mask="none", drop_masked=False, latent_mask=False, latent_noise=0.0,
        features_weight=0.0, hog_weight=0.0, preservation_weight=0.0,
    ),
)
TWO_STAGES = {"tokenizer": Stage(), "decoder": DECODER_FINETUNE}
STAGES = {
    "mactok": TWO_STAGES,
    "maetok": {  # its sections 3.3, 4.1: the mask ratio falls from 0.6 to 0 in the decoder's stage
        "tokenizer": Stage(),
        "decoder": DECODER_FINETUNE._replace(
            anneal_mask_ratio=True,
            overrides=DECODER_FINETUNE.overrides | dict(
                mask="random", mask_ratio_min=0.6, mask_ratio_max=0.6,
            ),
        ),
    },
    "ldetok": TWO_STAGES,
    "aligntok": {  # its sections 3.2, A: latent alignment, perceptual alignment, decoder refinement
        "adapter": Stage(
            steps_share=6 / 17, trainable=("encoder.adapter.", "bottleneck.", "decoder."),
            overrides=dict(preservation_weight=0.0),
        ),
        "joint": Stage(steps_share=11 / 17, lr_scale=0.1, overrides=dict(warmup_steps=0)),
        "decoder": DECODER_FINETUNE._replace(lr_scale=1.0),
    },
    "kl": TWO_STAGES,
    "ae": TWO_STAGES,
}
# fmt: on
