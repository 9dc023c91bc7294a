"""From a command line to a resolved Config, and whether its values fit together."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from align import TEACHERS, VIT_CONFIGS
from build import build_tokenizer
from classifiers import read_teacher
from recipes import (
    FULL_GENERATORS,
    FULL_RECIPES,
    PRESETS,
    RECIPES,
    TOKENIZER_FIELDS,
    TOY_RECIPES,
    TOY_TOKENS,
    Config,
    flag_of,
)
from sample import find_checkpoints
from tokenizer import BOTTLENECKS, MODEL_SIZES
from utils.checkpoint import read_checkpoint
from utils.console import Parser, UserError, as_user_error, bounded
from utils.distributed import DEVICES, PRECISIONS, Distributed, micro_batch_slices


def build_parser(description: str) -> Parser:
    """The flags of train.py: a few of its own, and one for each field of Config."""
    parser = Parser(
        description=f"{description}\nA value's source is in brackets, and then comes its default, "
        "the one of the preset toy."
    )
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
    add("--precision", choices=PRECISIONS, help="default: bf16 on GPUs that have it")
    add(
        "--compile",
        action="store_true",
        help="compile transformer blocks and LPIPS with torch.compile",
    )
    for field in fields(Config):
        about = field.metadata
        default = int(field.default) if field.type is bool else field.default
        add(
            f"--{flag_of(field)}",
            dest=field.name,
            metavar=None if about["choices"] else field.type.__name__.upper(),
            help=f"{about['help']} [{about['source']}] {default}",
            type=bounded(field.type, about["min"], about["max"]),
            choices=about["choices"],
        )
    return parser


def parse_config(arguments: list[str], description: str = "") -> tuple[Config, argparse.Namespace]:
    """Returns the resolved config, and the options that are not part of it.

    Later values win: those of the preset, the recipe, the scale (TOY_TOKENS and TOY_RECIPES, or
    FULL_GENERATORS and FULL_RECIPES), and the flags. With --tokenizer, that run's values take the
    place of all but the flags.
    """
    options = build_parser(description).parse_args(arguments)
    names = [field.name for field in fields(Config)]
    cli = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "tokenizer_run" in cli:
        if options.preset:
            raise UserError("--preset is not possible with --tokenizer, whose values are taken")
        config = Config(**inherited_values(cli) | cli)
    else:
        options.preset = options.preset or ("b256" if "data_dir" in cli else "toy")
        recipe = cli.get("recipe", "mactok")
        scale_values = find_scale_values(options.preset, recipe, cli)
        config = Config(**PRESETS[options.preset] | RECIPES[recipe] | scale_values | cli)
    stages = ("all", *config.stages, "latents", "generator")
    if options.stage not in stages:
        raise UserError(
            f"--stage {options.stage}: recipe {config.recipe} has the stages {', '.join(stages)}"
        )
    if config.patch_size == 0:
        config = replace(config, patch_size=choose_patch_size(config))
    return config, options


def find_scale_values(preset: str, recipe: str, cli: dict) -> dict:
    """The values of a recipe that depend on the scale."""
    if preset == "toy":
        return TOY_TOKENS.get(cli.get("num_latent_tokens"), {}) | TOY_RECIPES.get(recipe, {})
    if preset == "s128":  # the other papers' full-size values do not apply to it
        return {}
    generator = (FULL_RECIPES[recipe] | cli).get("generator", "sit")
    return FULL_GENERATORS.get(generator, {}) | FULL_RECIPES[recipe]


def inherited_values(cli: dict) -> dict:
    """The values of the run whose tokenizer is used, but for its folders and its seed.

    Raises UserError for flags that would make another tokenizer of it.
    """
    path = cli["tokenizer_run"]
    checkpoint = find_checkpoints(Path(path))[0]
    saved = read_checkpoint(checkpoint, mmap=True)
    with as_user_error(f"{checkpoint}: "):
        values = asdict(Config(**saved["config"]))
    for field in fields(Config):
        name = field.name
        if name in TOKENIZER_FIELDS and name in cli and cli[name] != values[name]:
            raise UserError(
                f"--{flag_of(field)} is {cli[name]}, but the tokenizer of {path} was made with "
                f"{values[name]}; leave the flag out"
            )
    own = ("data_dir", "out_dir", "weights_dir", "seed")
    return {name: value for name, value in values.items() if name not in own}


def choose_patch_size(config: Config) -> int:
    """The largest patch for which the grid has 8 to 16 patches per side, and L divides N."""
    # This size, then those around it, the nearest first.
    around = [config.image_size + sign * step for step in range(1, 33) for sign in (1, -1)]
    for image_size in (config.image_size, *filter(lambda size: size >= 11, around)):
        for grid_size in range(8, 17):
            fits = config.num_latent_tokens == 0 or grid_size**2 % config.num_latent_tokens == 0
            if image_size % grid_size == 0 and fits:
                if image_size == config.image_size:
                    return image_size // grid_size
                raise UserError(
                    f"--image_size {config.image_size}: no grid of 8 to 16 patches per side "
                    f"divides the image and has a multiple of --tokens {config.num_latent_tokens} "
                    f"patches; use --image_size {image_size}, or choose a --patch_size"
                )
    raise UserError(
        f"--tokens {config.num_latent_tokens} do not divide any grid of 8 to 16 patches per side; "
        "use another number, such as 16, 64 or 128, or choose a --patch_size"
    )


def check_config(config: Config, dist: Distributed) -> None:
    """Raise UserError for values that contradict each other, before anything is read or written."""
    problem = next(find_contradictions(config), None)
    if problem:
        raise UserError(problem)
    if config.needs_teacher_file:
        read_teacher(config.teacher_file, config.image_size, config.grid_size)
    micro_batch_slices(config.batch_size, config.micro_batch, dist)
    micro_batch_slices(
        config.generator_batch_size, config.generator_micro_batch, dist, flag_prefix="generator_"
    )
    with as_user_error(), torch.device("meta"):
        build_tokenizer(config)


def find_contradictions(config: Config) -> Iterator[str]:
    """Yield what is wrong with a config, in sentences."""
    num_patches = config.grid_size**2
    tokens = config.num_latent_tokens
    uses_feature_decoders = config.features_weight + config.hog_weight > 0
    uses_alignment = config.local_weight + config.global_weight > 0
    if config.image_size % config.patch_size:
        yield (
            f"--patch_size {config.patch_size} does not divide --image_size {config.image_size}; "
            "use a divisor"
        )
    if config.kl_weight and "kl" not in BOTTLENECKS[config.bottleneck].loss_names:
        yield (
            f"--kl_weight is {config.kl_weight}, but a {config.bottleneck} bottleneck has no KL "
            "divergence; use --kl_weight 0"
        )
    has_latent_losses = uses_feature_decoders or uses_alignment
    is_pretrained = config.encoder_init == "teacher"
    if config.drop_masked and (tokens or has_latent_losses or is_pretrained):
        yield (
            "--drop_masked 1 leaves out latents of patches, so it needs --tokens 0, no losses on "
            "latents, and an encoder that is not a teacher"
        )
    if is_pretrained and tokens:
        yield (
            f"--tokens is {tokens}, but a teacher as the encoder has one latent per patch; "
            "use --tokens 0"
        )
    if config.for_stage(config.first_stage).preservation_weight:
        yield (
            f"--preservation_weight {config.preservation_weight}: the {config.first_stage} stage "
            "has no stage before it whose latents it could preserve"
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
    if uses_alignment and tokens and num_patches % tokens:
        yield (
            f"--tokens {tokens} does not divide the {num_patches} patches of --patch_size "
            f"{config.patch_size}, and local alignment (eq. 3) gives each latent the same number; "
            "use a divisor, or --local_weight 0 --global_weight 0"
        )
    if config.needs_teacher_file and not Path(config.teacher_file).is_file():
        yield (
            f"--teacher {config.teacher} is neither a file that lab.py teacher wrote nor one of "
            f"{', '.join(TEACHERS)}"
        )
    if config.encoder_init in VIT_CONFIGS:
        encoder_size, _ = MODEL_SIZES[config.tokenizer_size]
        if VIT_CONFIGS[config.encoder_init][:3] != encoder_size:
            yield (
                f"--encoder_init {config.encoder_init} has another width or depth than the encoder "
                f"of --size {config.tokenizer_size}"
            )
