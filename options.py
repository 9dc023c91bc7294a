"""From a command line to a resolved Config, and whether its values fit together."""

import argparse
from dataclasses import fields, replace

import torch

from align import VIT_CONFIGS
from build import build_tokenizer
from recipes import (
    FULL_GENERATORS,
    FULL_RECIPES,
    PRESETS,
    RECIPES,
    SMALL_PRESETS,
    TOY_TOKENS,
    Config,
)
from tokenizer import MODEL_SIZES
from utils.console import Parser, UserError, as_user_error, bounded
from utils.distributed import DEVICES, Distributed, micro_batch_slices


def flag_of(field) -> str:
    """A field's flag on the command line, without the dashes."""
    return field.metadata["flag"] or field.name


def build_parser(description: str) -> Parser:
    """The flags of train.py: a few of its own, and one for each field of Config."""
    parser = Parser(description=f"{description}\nSources are in brackets; the toy's value is last.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the scale (default: toy; b256 with --data)")
    add(
        "--stage",
        default="all",
        help="one stage of the recipe, latents, or generator (default: all)",
    )
    add(
        "--dry_run", action="store_true", help="print files, sizes, memory and time of a step; stop"
    )
    add("--device", choices=DEVICES, help="default: cuda if there is a GPU, else cpu")
    add("--precision", choices=("bf16", "float32"), help="default: bf16 on GPUs that have it")
    add("--compile", action="store_true", help="use torch.compile for the transformer blocks")
    for field in fields(Config):
        about = field.metadata
        add(
            f"--{flag_of(field)}",
            dest=field.name,
            metavar=None if about["choices"] else field.type.__name__.upper(),
            help=f"{about['help']} [{about['source']}] {field.default}",
            type=bounded(field.type, about["min"], about["max"]),
            choices=about["choices"],
        )
    return parser


def parse_config(arguments: list[str], description: str = "") -> tuple[Config, argparse.Namespace]:
    """-> the resolved config, and the options that are not part of it.

    Flags win over the recipe's values, those over the generator's, and those over the preset's.
    """
    options = build_parser(description).parse_args(arguments)
    names = [field.name for field in fields(Config)]
    cli = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.preset is None:
        options.preset = "b256" if "data_dir" in cli else "toy"
    recipe = cli.get("recipe", "mactok")
    scale_values = {}
    if options.preset == "toy":
        scale_values = TOY_TOKENS.get(cli.get("num_latent_tokens"), {})
    elif options.preset not in SMALL_PRESETS:
        generator = (FULL_RECIPES[recipe] | cli).get("generator", "sit")
        scale_values = FULL_GENERATORS[generator] | FULL_RECIPES[recipe]
    config = Config(**PRESETS[options.preset] | RECIPES[recipe] | scale_values | cli)
    stages = ("all", *config.stages, "latents", "generator")
    if options.stage not in stages:
        raise UserError(
            f"--stage {options.stage}: recipe {config.recipe} has the stages {', '.join(stages)}"
        )
    if config.patch_size == 0:
        config = replace(config, patch_size=choose_patch_size(config))
    return config, options


def choose_patch_size(config: Config) -> int:
    """The largest patch for which the grid has 8 to 16 patches per side, and L divides N."""
    for image_size in (config.image_size, *neighbors(config.image_size)):
        for grid_size in range(8, 17):
            fits = config.num_latent_tokens == 0 or grid_size**2 % config.num_latent_tokens == 0
            if image_size % grid_size == 0 and fits:
                if image_size == config.image_size:
                    return image_size // grid_size
                raise UserError(
                    f"--image_size {config.image_size}: no grid of 8 to 16 patches per side fits, "
                    f"into which --tokens {config.num_latent_tokens} can be divided; use "
                    f"--image_size {image_size}, or choose a --patch_size"
                )
    raise UserError(
        f"--tokens {config.num_latent_tokens} do not divide any grid of 8 to 16 patches per side; "
        "use another number, such as 16, 64 or 128, or choose a --patch_size"
    )


def neighbors(size: int) -> list[int]:
    """Other sizes, nearest first."""
    distances = range(1, 33)
    return [size + sign * distance for distance in distances for sign in (1, -1)]


def check_config(config: Config, dist: Distributed) -> None:
    """Raise UserError for values that contradict each other, before anything is read or written."""
    for problem in find_contradictions(config):
        raise UserError(problem)
    micro_batch_slices(config.batch_size, config.micro_batch, dist)
    micro_batch_slices(
        config.generator_batch_size, config.micro_batch, dist, flag="generator_batch_size"
    )
    with as_user_error(), torch.device("meta"):
        build_tokenizer(config)


def find_contradictions(config: Config):
    """Yield what is wrong with a config, in sentences."""
    num_patches = config.grid_size**2
    tokens = config.num_latent_tokens
    uses_decoders = config.features_weight + config.hog_weight > 0
    uses_alignment = config.local_weight + config.global_weight > 0
    first_stage = next(iter(config.stages))
    if config.image_size % config.patch_size:
        yield (
            f"--patch_size {config.patch_size} does not divide --image_size {config.image_size}; "
            "use a divisor"
        )
    if config.bottleneck == "deterministic" and config.kl_weight:
        yield (
            f"--kl_weight is {config.kl_weight}, but a deterministic bottleneck has no KL "
            "divergence; use --kl_weight 0"
        )
    has_latent_losses = uses_decoders or uses_alignment
    is_pretrained = config.encoder_init == "teacher"
    if config.drop_masked and (tokens or has_latent_losses or is_pretrained):
        yield (
            "--drop_masked 1 leaves out latents of patches: it needs --tokens 0, no losses on "
            "latents, and an encoder that is not a teacher"
        )
    if config.encoder_init == "teacher" and tokens:
        yield (
            f"--tokens is {tokens}, but a teacher as the encoder has one latent per patch; "
            "use --tokens 0"
        )
    if config.for_stage(first_stage).preservation_weight:
        yield (
            f"--preservation_weight {config.preservation_weight}: stage {first_stage} has no stage "
            "before it whose latents it could preserve"
        )
    if config.adversarial_weight and config.image_size % 16:
        yield f"--image_size is {config.image_size}; the discriminator needs a multiple of 16"
    if config.perceptual_weight and config.image_size < 16:
        yield f"--image_size is {config.image_size}; LPIPS needs at least 16"
    if tokens > num_patches:
        yield (
            f"--tokens {tokens} is more than the {num_patches} patches of --patch_size "
            f"{config.patch_size}; use fewer tokens or smaller patches"
        )
    if config.local_weight and tokens and num_patches % tokens:
        yield (
            f"--tokens {tokens} does not divide the {num_patches} patches of --patch_size "
            f"{config.patch_size}, and local alignment (eq. 3) gives each latent as many; use a "
            "divisor, or --local_weight 0"
        )
    if config.encoder_init in VIT_CONFIGS:
        encoder_size, _ = MODEL_SIZES[config.tokenizer_size]
        if VIT_CONFIGS[config.encoder_init][:3] != encoder_size:
            yield (
                f"--encoder_init {config.encoder_init} has another width or depth than the encoder "
                f"of --size {config.tokenizer_size}"
            )
