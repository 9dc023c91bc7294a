"""The commands of README.md and docs/ run in order, as they are written; links and facts hold.

Only sizes and counts of the commands are made tiny.
"""

import importlib
import re
import shlex
from functools import cache, reduce

import numpy as np
import pytest
from reference import ROOT, TINY, make_folder, official_folder

import evaluate
import fid
import lab
import options
import sample
import train
from utils.shapes import Shapes

DOCS = sorted(ROOT.glob("docs/*.md"))
TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", *DOCS)}
README = TEXTS["README.md"]
METHOD = TEXTS["method.md"]
PROGRAMS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "fid.py": fid.main,
    "evaluate.py": evaluate.main,
    "lab.py": lab.main,
}
TINY_STEPS = (
    "--tokenizer_steps 2 --decoder_steps 2 --generator_steps 2 --eval_images 4 --sampling_steps 2"
)
NO_WEIGHTS = (
    "--size toy --generator_size toy --teacher hog --encoder_init none --perceptual_weight 0 "
    "--adversarial_weight 0"
)


NOT_OBJECTS = ("py", "md", "pt", "decode")  # file.py, and methods of variables with a file's name


def code_blocks(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [content for name, content in blocks if name == language]


def read_commands(text: str) -> list[list[str]]:
    """The words of each command in the code blocks, without comments."""
    commands = []
    for block in code_blocks(text, ""):
        for line in block.splitlines():
            for part in line.partition("  # ")[0].split("&&"):
                words = shlex.split(part)
                if words:
                    assert words[0] in ("python", "torchrun", "pip"), words
                    commands.append(words)
    return [words for words in commands if words[0] != "pip"]


def shrink(script: str, arguments: list[str], weights) -> list[str]:
    """The same command, with tiny sizes and without official weights."""
    if script == "train.py":
        if "--tokenizer" in arguments:  # whose values are taken
            return [*arguments, *TINY_STEPS.split()]
        config, _ = options.parse_config(arguments)  # as it is written
        tokens = min(4, config.num_latent_tokens)
        tiny = f"{TINY} {TINY_STEPS} {NO_WEIGHTS} --tokens {tokens}"
        return [word for word in (*arguments, *tiny.split()) if word != "--compile"]
    if arguments[0] == "teacher":
        return [*arguments, "--epochs", "1", *TINY.split()]
    if script == "lab.py":
        return [*arguments, "--only", "no", "--seeds", "1", "--steps", "2", *TINY.split()]
    text = re.sub(r"--npz \d+", "--npz 6 --steps 2", shlex.join(arguments))
    arguments = text.replace("--image_size 256", "--image_size 16").split()
    needs_weights = script == "fid.py" or arguments[0] in ("rfid", "stats")
    return arguments + (["--weights", str(weights)] if needs_weights else [])


def test_the_commands_run_in_order(tmp_path, monkeypatch):
    """Those of the README, then those of docs/, in one folder."""
    monkeypatch.chdir(tmp_path)
    all_features = fid.inception_features

    def few_features(*arguments):  # 64 of the 2048, whose eigenvalues take no time
        return all_features(*arguments)[:, :64]

    load_once = cache(fid.load_inception)
    for module in (fid, evaluate):
        monkeypatch.setattr(module, "inception_features", few_features)
    monkeypatch.setattr(fid, "load_inception", lambda weights, device: load_once(weights, "cpu"))
    monkeypatch.setattr(fid.InceptionV3, "logits", lambda model, pool3: pool3)
    monkeypatch.setattr(Shapes, "__len__", lambda self: 60)
    monkeypatch.setattr(lab.Pictures, "draw_all", lambda self: iter(()))  # test_lab.py draws them
    make_folder(tmp_path / "photos", 0, 20)
    make_folder(tmp_path / "imagenet" / "train", 3, 10)
    make_folder(tmp_path / "imagenet" / "val", 2, 10)
    make_folder(tmp_path / "cifar10" / "teacher", 2, 20)
    make_folder(tmp_path / "cifar10" / "runs", 2, 20)
    weights = official_folder(tmp_path / "weights", fid.INCEPTION_FILE.removesuffix(".pth"))
    noise = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=noise)
    ran = []
    for words in [words for text in (README, *TEXTS.values()) for words in read_commands(text)]:
        script = next((word for word in words if word in PROGRAMS), None)
        if script is None:
            assert words in (["python", "-m", "pytest"], ["python", "tests/bench.py"])
            continue
        if shlex.join(words) in ran:
            continue
        arguments = words[words.index(script) + 1 :]
        PROGRAMS[script](shrink(script, arguments, weights))
        ran.append(shlex.join(words))
    assert len(ran) > 20
    assert all(any(script in command for command in ran) for script in PROGRAMS)


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Shapes, "__len__", lambda self: 60)
    train.main(f"{TINY} {TINY_STEPS}".split())
    (lines,) = code_blocks(README, "python")
    names = {}
    exec(lines, names)
    assert names["images"].shape == (2, 3, 16, 16)


def test_the_readme_is_one_page():
    assert len(README.split()) <= 2500


def equation_numbers(text: str) -> set[int]:
    """ "eq. 3, 5-6" -> {3, 5, 6}."""
    found = set()
    for listed in re.findall(r"\b[Ee]q\. (\d[\d, -]*)", text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def find_object(name: str):
    """ "tokenizer.Tokenizer.encode" -> the function."""
    module, *path = name.split(".")
    return reduce(getattr, path, importlib.import_module(module))


def test_each_equation_has_its_function_and_each_function_names_its_equation():
    """The table in method.md: equation or section, what it says, file.function."""
    pattern = r"^\| ((?:eq\. |[34]\.|B\.)[^|]*) \| [^|]* \| `([\w.]+)` \|$"
    rows = re.findall(pattern, METHOD, re.M)
    assert len(rows) == 14
    for place, name in rows:
        docstring = find_object(name).__doc__
        assert equation_numbers(place) <= equation_numbers(docstring), name
        if not place.startswith("eq."):
            assert all(section in docstring for section in place.split(", ")), name
    named = set().union(*(equation_numbers(place) for place, _ in rows))
    assert named == set(range(1, 10))


def test_functions_that_the_docs_name_exist():
    """In code blocks and between backquotes, where a file of ours comes before the dot."""
    modules = {path.stem for path in ROOT.glob("*.py")}
    checked = 0
    for text in TEXTS.values():
        for module, path in re.findall(r"\b(\w+)\.((?:\w+\.)*\w+)", text):
            if module in modules and path.split(".")[0] not in NOT_OBJECTS:
                find_object(f"{module}.{path}")
                checked += 1
    assert checked > 30


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    """Within the repository, and to headings of the same page."""
    text = TEXTS[name]
    folder = ROOT if name == "README.md" else ROOT / "docs"
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (folder / link).exists(), link


def test_the_map_lists_every_file():
    listed = set(re.findall(r"\]\((\w+\.py)\)", README))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def test_the_facts_are_the_presets():
    """Numbers of sources.md that are also values of recipes.py."""
    facts = TEXTS["sources.md"]
    paper, _ = options.parse_config(["--data", "x"])
    toy, _ = options.parse_config([])
    for text in (
        f"L = {paper.num_latent_tokens} or 64, C = {paper.latent_dim}",
        f"M = {paper.mask_ratio_max}",
        f"{paper.adversarial_weight} adversarial",
        "1e-6 KL",
        f"{paper.local_weight} alignment",
        f"trains from step {paper.discriminator_start // 1000}K",
        f"{paper.tokenizer_steps // 1000}K x {paper.batch_size} at 256 px",
        f"XL {paper.generator_steps // 10**6}M steps",
        f"decay min({paper.ema_decay}",
        f"{paper.sampling_steps} steps, interval",
        f"{toy.image_size} px, N = {toy.grid_size**2}, L = {toy.num_latent_tokens}",
        f"M = {toy.mask_ratio_max}, alignment {toy.local_weight}",
    ):
        assert text in facts, text
