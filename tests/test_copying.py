"""Each method file can be copied alone, with the files it names, and the example in its docstring runs there."""

import ast
import shlex
import shutil
import subprocess
import sys

import pytest
from reference import ENV, ROOT

WITH = {"tokenizer": (), "masking": (), "losses": (), "align": ("tokenizer",), "sit": ("tokenizer",)}  # file: imports of ours
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}


@pytest.mark.parametrize("name", WITH)
def test_a_method_file_imports_nothing_else_of_ours(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert {"plumbing", "train", *WITH} <= OURS and imported & OURS == set(WITH[name])


@pytest.mark.parametrize("name", WITH)
def test_a_copied_method_file_runs_its_example(name, tmp_path):
    for copied in (name, *WITH[name]):
        shutil.copy(ROOT / f"{copied}.py", tmp_path)
    docstring = ast.get_docstring(ast.parse((tmp_path / f"{name}.py").read_text()))
    (example,) = (line for line in docstring.splitlines() if line.startswith("    python -c"))
    python, *words = shlex.split(example)
    environment = {key: value for key, value in ENV.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert python == "python" and done.returncode == 0 and done.stdout.strip(), done.stderr
