"""The README's commands run in order, as they are written, in one folder; only sizes and counts are made tiny."""

import importlib
import re
import shlex
from functools import cache, reduce

import numpy as np
from reference import ROOT, TINY, make_folder, official_folder

import fid
import lab
import recipes
import sample
import train
from plumbing.shapes import Shapes
from plumbing.weights import OFFICIAL

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
MAIN = {"train.py": train.main, "sample.py": sample.main, "fid.py": fid.main, "lab.py": lab.main}
TINY_STEPS = "--tokenizer_steps 2 --decoder_steps 2 --sit_steps 2 --eval_images 4 --sample_steps 2"


def commands() -> list[list[str]]:
    """Words of each command of ours, comments and what precedes && removed; a shell loop is unrolled."""
    text = "".join(block for language, block in BLOCKS if not language and not block.startswith("images  "))  # the data flow
    for loop in re.findall(r"^for .*?^done\n", text, re.S | re.M):
        values, body = re.fullmatch(r"for g in (.*?); do\n(.*)done\n", loop, re.S).groups()
        text = text.replace(loop, "".join(body.replace("$g", value) for value in values.split()))
    lines = (part.strip() for line in text.splitlines() for part in line.partition("  # ")[0].split("&&"))
    found = [shlex.split(line) for line in lines]
    assert all(words[0] in ("python", "torchrun", "git", "cd", "pip") for words in found if words)
    return [words for words in found if words and words[0] in ("python", "torchrun")]


def test_the_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = fid.inception_features  # 64 of the 2048, for eigenvalues in no time
    monkeypatch.setattr(fid, "inception_features", lambda *inputs: features(*inputs)[:, :64])
    monkeypatch.setattr(fid.InceptionV3, "logits", lambda model, pool3: pool3)
    monkeypatch.setattr(fid, "load_inception", cache(fid.load_inception))
    monkeypatch.setattr(Shapes, "__len__", lambda self: 60)
    make_folder(tmp_path / "photos", 0, 20)
    make_folder(tmp_path / "imagenet" / "train", 3, 10)
    make_folder(tmp_path / "imagenet" / "val", 2, 10)
    inception = OFFICIAL["inception"].file
    weights = official_folder(tmp_path / "weights", inception.removesuffix(".pth"))
    noise = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=noise)
    ran = []
    for words in commands():
        script = next((word for word in words if word in MAIN), None)
        if script is None:
            assert words == ["python", "-m", "pytest"]
            continue
        arguments = words[words.index(script) + 1 :]
        if script == "train.py":
            config, _ = recipes.parse_config(arguments)  # as it is written; then the same, tiny
            made = [*arguments, *f"{TINY} {TINY_STEPS} --patch_size 2 --tokens {min(4, config.tokens)}".split()]
            made += "--size toy --sit toy --teacher hog --encoder_init none --perceptual_weight 0 --adversarial_weight 0".split()
            arguments = [word for word in made if word != "--compile"]
        elif script == "lab.py":
            arguments += ["--only", "no", "--seeds", "1", "--steps", "2", *TINY.split()]  # "nothing", "no mask"
        else:
            text = re.sub(r"--npz \d+", "--npz 6 --steps 2", shlex.join(arguments))
            arguments = text.replace("--image_size 256", "--image_size 16").replace("207,360", "1,2").split()
            if script == "fid.py" and arguments[0] in ("gfid", "rfid", "stats"):
                arguments += ["--weights", str(weights)]
        MAIN[script](arguments)
        ran.append(script)
    assert len(ran) > 20 and set(ran) == set(MAIN)


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Shapes, "__len__", lambda self: 60)
    train.main(f"{TINY} {TINY_STEPS}".split())
    (lines,) = (block for language, block in BLOCKS if language == "python")
    names = {}
    exec(lines, names)
    assert names["images"].shape == (2, 3, 16, 16)


def numbers(text: str) -> set[int]:
    """Of equations: "eq. 3, 5-6" -> {3, 5, 6}."""
    found = set()
    for listed in re.findall(r"\b[Ee]q\. (\d[\d, -]*)", text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_each_equation_has_its_function_and_each_function_names_its_equation():
    """The README's map: equation or section, what it says, file.function."""
    rows = re.findall(r"^\| ((?:eq\. |[34]\.|B\.)[^|]*) \| [^|]* \| `([\w.]+)` \|$", README, re.M)
    for place, name in rows:
        module, *path = name.split(".")
        about = reduce(getattr, path, importlib.import_module(module)).__doc__
        assert numbers(place) <= numbers(about), name
        assert place.startswith("eq.") or all(section in about for section in place.split(", ")), name
    assert set().union(*(numbers(place) for place, _ in rows)) == set(range(1, 10)) and len(rows) == 14


def test_the_pictures_are_there_and_no_heading_is_lost():
    """Links within the repository, and to headings of the README."""
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", README, re.M)}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 10
    for link in links:
        assert (link[1:] in headings) if link.startswith("#") else (ROOT / link).exists(), link
