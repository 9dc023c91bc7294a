#!/usr/bin/env bash
# The first hour on a GPU: tests, memory and time of every preset, speed. Nothing is downloaded.
#
#     bash tests/first_gpu.sh PHOTOGRAPHS [OUT]
#
# PHOTOGRAPHS is a folder of a few hundred images, one sub-folder per class. All that is printed is
# also in OUT/report.txt (first_gpu/report.txt); please send it, with the card's name in its first
# lines. A part that fails is named at the end, and the next one goes on.
set -uo pipefail
photographs=$(realpath "${1:?"usage: bash tests/first_gpu.sh PHOTOGRAPHS [OUT]"}")
out=$(realpath -m "${2:-first_gpu}")
cd "$(dirname "$0")/.."
presets=${PRESETS-"toy s128 s256 b256 b512 bl512"}
recipes=${RECIPES-"maetok ldetok aligntok"}
mkdir -p "$out"
failed=()

part() { # runs a command under a title
    echo
    echo "=== $*"
    "$@" || failed+=("$*")
}

report() {
    date
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"

    # Right: losses beside a CPU's, compiled and in bf16; waits; two GPUs if there are two.
    part python -m pytest -m gpu --tb=short --numprocesses=0

    # Memory and time: what every preset and recipe takes, and what fits on which card.
    for preset in $presets; do
        part python train.py --preset "$preset" --data "$photographs" --dry_run
    done
    for recipe in $recipes; do
        part python train.py --recipe "$recipe" --data "$photographs" --dry_run
    done

    # Fast: images per second and share of the card's peak; bf16, compiled, and TF32.
    for preset in $presets; do
        part python tests/bench.py --preset "$preset"
        part python tests/bench.py --preset "$preset" --compile
    done
    part python tests/bench.py --preset s128 --precision float32
    part python tests/bench.py --fid

    # A whole run that ends in samples, and the difference that bf16 makes to them.
    part python train.py --device cuda --out "$out/run"
    part python sample.py "$out/run" --npz 2000 --out "$out/float32.npz"
    part python sample.py "$out/run" --npz 2000 --precision bf16 --out "$out/bf16.npz"

    echo
    echo "failed: ${#failed[@]}"
    printf '%s\n' "${failed[@]}"
}

report 2>&1 | tee "$out/report.txt"
