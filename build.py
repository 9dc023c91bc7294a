"""From a config to what a run needs: its data, and its networks with their official weights."""

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from align import TEACHERS, VIT_CONFIGS, AlignmentLoss, DINOFeatures, ViT
from classifiers import SmallTeacher, load_teacher
from family import (
    FeatureDecoder,
    GridDecoder,
    GridEncoder,
    MaskFeatHOG,
    PreservationLoss,
    PretrainedEncoder,
)
from fid import InceptionV3
from losses import LPIPS, GANLoss
from recipes import Config, flag_of
from sit import GENERATORS
from tokenizer import MODEL_SIZES, Decoder, Tokenizer, load_dinov2
from utils.console import UserError
from utils.data import ImageFolder, open_dataset, train_val_split
from utils.distributed import Distributed, tune_compiler
from utils.files import hash_file
from utils.shapes import Shapes
from utils.weights import PRETRAINED, load_pretrained


@dataclass
class TrainContext:
    """What all stages of a run share."""

    config: Config
    dist: Distributed
    data: ImageFolder | Shapes
    train_indices: np.ndarray
    val_indices: np.ndarray
    is_dry_run: bool = False  # measure only: networks whose official files are missing stay random
    use_bf16: bool = False  # for matrix products
    compile: bool = False  # transformer blocks and LPIPS
    inception: InceptionV3 | None = None  # where its file is available
    teacher_hash: str = ""  # of the file of a trained teacher

    @staticmethod
    def open(config: Config, dist: Distributed, options: Namespace) -> "TrainContext":
        """Find the data and split it. By default GPUs that have bfloat16 use it."""
        data = open_dataset(config.data_dir, config.image_size)
        if len(data) < 2:
            raise UserError(f"{config.data_dir} has only one image; at least two are needed")
        train_indices, val_indices = train_val_split(data.labels, config.eval_images)
        if options.compile:
            tune_compiler()
        use_bf16 = options.precision == "bf16"
        if options.precision is None and dist.device.type == "cuda":
            use_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return TrainContext(
            config,
            dist,
            data,
            train_indices,
            val_indices,
            is_dry_run=options.dry_run,
            use_bf16=use_bf16,
            compile=options.compile,
            teacher_hash=hash_file(config.teacher_file) if config.needs_teacher_file else "",
        )

    @property
    def num_latents(self) -> int:
        """The rows of latents.npy: one per training image, and one per mirror image."""
        return len(self.train_indices) * (2 if self.config.flip else 1)

    @property
    def device(self) -> torch.device:
        return self.dist.device

    def path(self, name: str) -> Path:
        """A file in the run's folder."""
        return Path(self.config.out_dir) / name

    def to_device(self, network: nn.Module) -> nn.Module:
        """Move a network to this process's device and, if asked for, compile its parts.

        These are transformer blocks and LPIPS. A deepcopy of a network is not compiled.
        """
        if self.compile:
            for module in network.modules():
                parts = [module] if isinstance(module, LPIPS) else getattr(module, "blocks", ())
                for part in parts:
                    part.compile()
        return network.to(self.device)

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 if asked for; weights and losses stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.use_bf16)

    def identity(self, stage: str, encoder_hash: str) -> dict:
        """What must be the same for a stage's checkpoint to be resumed, by flag.

        encoder_hash is that of the encoder that the stage starts with, or "".
        """
        scopes = ("all", stage)
        values = {
            flag_of(field): getattr(self.config, field.name)
            for field in fields(Config)
            if field.metadata["resume_scope"] in scopes
        }
        if self.config.teacher_file:  # a file may move, but not change
            values["teacher"] = f"file of SHA-256 {self.teacher_hash[:16]}"
        values |= {"stage": stage, "classes": list(self.data.classes)}
        return values | {"data": self.data.fingerprint, "encoder": encoder_hash}


# --------------------------------------------------------------------------------------------------
# Networks that are trained.


def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a config, with random weights.

    With 0 latent tokens there is one latent per patch; only then can the encoder be a teacher
    (options.py checks it).
    """
    grid_size = config.grid_size
    encoder_size, decoder_size = MODEL_SIZES[config.tokenizer_size]
    num_latent_tokens = config.num_latent_tokens
    encoder, decoder = None, None
    is_2d = num_latent_tokens == 0
    if is_2d:
        num_latent_tokens = grid_size**2
        out_dim = 3 * config.patch_size**2
        decoder = GridDecoder(grid_size, config.latent_dim, out_dim, *decoder_size)
        if config.encoder_init == "teacher":
            encoder = PretrainedEncoder(build_teacher(config))
        else:
            encoder = GridEncoder(grid_size, config.patch_size, *encoder_size)
    return Tokenizer(
        config.image_size,
        config.patch_size,
        num_latent_tokens,
        config.latent_dim,
        model_size=config.tokenizer_size,
        bottleneck=config.bottleneck,
        encoder=encoder,
        decoder=decoder,
        is_2d=is_2d,
    )


def build_teacher(config: Config) -> nn.Module:
    """The teacher of a config, with random weights.

    The file of a trained teacher is not read: sampling does not need it, and it may be gone.
    """
    if config.teacher_file:
        return SmallTeacher(config.grid_size)
    return TEACHERS[config.teacher](config.grid_size)


def build_latent_losses(
    weights: dict[str, float], tokenizer: Tokenizer, teachers: dict[str, nn.Module]
) -> nn.ModuleList:
    """The losses on latents with a weight above 0; all have AlignmentLoss's signature."""
    losses = nn.ModuleList()
    decoder = tokenizer.decoder
    if weights["local"] or weights["global"]:
        teacher_width = teachers["teacher"].width
        losses.append(AlignmentLoss(tokenizer.latent_dim, decoder.width, teacher_width))
    for loss_name, target in (("features", "teacher"), ("hog", "maskfeat")):
        if weights[loss_name]:
            feature_decoder = build_feature_decoder(tokenizer, teachers[target].width)
            losses.append(FeatureDecoder(loss_name, target, feature_decoder))
    if weights["preservation"]:
        losses.append(PreservationLoss())
    return losses


def build_feature_decoder(tokenizer: Tokenizer, out_dim: int) -> nn.Module:
    """MAETok's auxiliary decoder: 3 blocks of a quarter of the decoder's width.

    For the size B that is a width of 192 with 3 heads (config: MAETok's code).
    """
    width = tokenizer.decoder.width // 4
    num_heads = tokenizer.decoder.num_heads // 4
    sizes = dict(out_dim=out_dim, width=width, depth=3, num_heads=num_heads)
    if tokenizer.is_2d:
        return GridDecoder(tokenizer.grid_size, tokenizer.latent_dim, **sizes)
    return Decoder(tokenizer.grid_size, tokenizer.num_latent_tokens, tokenizer.latent_dim, **sizes)


def build_gan(device: torch.device | str) -> GANLoss:
    """The discriminator for features of DINO, with random weights, and its losses."""
    width, *_ = VIT_CONFIGS["dino_vits16"]
    return GANLoss(width).to(device)


def build_generator(config: Config, tokenizer: Tokenizer, num_classes: int) -> nn.Module:
    """The generator for the tokenizer's latents, with random weights."""
    return GENERATORS[config.generator](
        tokenizer.num_latent_tokens,
        tokenizer.latent_dim,
        num_classes,
        config.generator_size,
        tokenizer.is_2d,
    )


def init_from_pretrained(context: TrainContext, tokenizer: Tokenizer) -> None:
    """Start the encoder from DINOv2 (section 4.1) or from a teacher, if the config says so."""
    config = context.config
    name = config.encoder_weights
    if config.encoder_init == "teacher" and config.teacher_file:
        load_teacher(tokenizer.encoder.teacher, config.teacher_file, config.image_size)
    if name not in VIT_CONFIGS:
        return
    dinov2 = load_pretrained(ViT(name), name, config.weights_dir, context.is_dry_run).state_dict()
    if config.encoder_init == "teacher":
        tokenizer.encoder.teacher.vit.load_state_dict(dinov2)
    else:
        load_dinov2(tokenizer.encoder, dinov2)


# --------------------------------------------------------------------------------------------------
# Frozen networks.


@dataclass
class FrozenNetworks:
    """Teachers, the discriminator's backbone and LPIPS."""

    teachers: dict[str, nn.Module]  # "teacher" and MAETok's "maskfeat": images -> cls, patches
    disc_backbone: DINOFeatures | None
    lpips: LPIPS | None

    def pretrained_parts(self) -> dict[str, nn.Module]:
        """The modules that official files are loaded into, by the name of the file."""
        parts = {}
        for network in (*self.teachers.values(), self.disc_backbone):
            if hasattr(network, "vit"):  # not HOG, and not None
                parts[network.vit.name] = network.vit
        if self.lpips:
            parts |= {"vgg16": self.lpips.vgg, "lpips_vgg": self.lpips.linear}
        return parts


def build_frozen_networks(config: Config) -> FrozenNetworks:
    """What a stage with this config needs, without weights."""
    teachers = {}
    if config.needs_teacher:
        teachers["teacher"] = build_teacher(config)
    if config.hog_weight:
        teachers["maskfeat"] = MaskFeatHOG(config.grid_size, config.patch_size)
    return FrozenNetworks(
        teachers,
        disc_backbone=DINOFeatures() if config.adversarial_weight else None,
        lpips=LPIPS() if config.perceptual_weight else None,
    )


def load_frozen_networks(context: TrainContext, config: Config) -> FrozenNetworks:
    """`build_frozen_networks` with official weights, frozen and on the device."""
    networks = build_frozen_networks(config)
    for name, part in networks.pretrained_parts().items():
        load_pretrained(part, name, config.weights_dir, random_if_missing=context.is_dry_run)
    if config.teacher_file and config.needs_teacher:
        teacher = networks.teachers["teacher"].requires_grad_(False)
        load_teacher(teacher, config.teacher_file, config.image_size)
    for network in (*networks.teachers.values(), networks.disc_backbone, networks.lpips):
        if network is not None:
            context.to_device(network).eval()
    return networks


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module learns or holds fixed, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def describe_parameters(module: nn.Module) -> str:
    """For example "1.2M parameters"."""
    return f"{count_parameters(module) / 1e6:.1f}M parameters"


def required_weights(config: Config, stages: list[str]) -> list[str]:
    """The names of the official files that these stages need."""
    names = set()
    for stage in stages:
        if stage not in config.stages:
            continue
        with torch.device("meta"):
            names |= build_frozen_networks(config.for_stage(stage)).pretrained_parts().keys()
        if stage == config.first_stage:
            names.add(config.encoder_weights)
    return [name for name in PRETRAINED if name in names]
