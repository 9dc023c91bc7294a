"""The networks that a stage only looks through, and the official files that stages need."""

from torch import nn

from align import DINO, TEACHERS, CellHOG
from plumbing.state import Run
from plumbing.weights import LPIPS_FILES, OFFICIAL, load_lpips, load_official
from recipes import Config


def frozen_networks(run: Run, cfg: Config) -> dict[str, nn.Module]:
    """What is only looked through: a teacher, HOG of MAETok's kind, the discriminator's DINO, LPIPS; with official weights."""
    grid, networks = cfg.image_size // cfg.patch_size, {}
    if cfg.uses_teacher:
        networks["teacher"] = TEACHERS[cfg.teacher](grid)
    if cfg.hog_weight:
        networks["hog"] = CellHOG(grid, cfg.patch_size)
    if cfg.adversarial_weight:
        networks["eye"] = DINO()
    for network in networks.values():
        if hasattr(network, "vit"):
            load_official(network.vit, network.vit.name, cfg.weights, run.dry)
    if cfg.perceptual_weight:
        networks["lpips"] = load_lpips(cfg.weights, run.dry)
    return {name: network.to(run.device).eval().requires_grad_(False) for name, network in networks.items()}


def official_files(cfg: Config, stages: list[str]) -> list[str]:
    """Which official files these stages need."""
    names = []
    for stage in filter(cfg.stages.get, stages):
        at = cfg.at(stage)
        names += [at.encoder_file] if stage == next(iter(cfg.stages)) else []
        names += [at.teacher] if at.uses_teacher else []
        names += [*(LPIPS_FILES if at.perceptual_weight else ()), "dino_vits16" if at.adversarial_weight else ""]
    return [name for name in OFFICIAL if name in names]
