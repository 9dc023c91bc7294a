"""Each method file can be copied alone, with the files that it imports, and runs there."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import ENV, ROOT

# The method files, and which other files of ours each of them imports.
IMPORTS = {
    "tokenizer": (),
    "masking": (),
    "losses": (),
    "align": ("tokenizer",),
    "sit": ("tokenizer",),
    "family": ("align", "masking", "tokenizer"),
    "fid": (),
}
OUR_FILES = {path.stem for path in ROOT.glob("*.py")}
OUR_PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}


def run_copy(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Copy a method file with what it imports into a folder, and run it there."""
    for copied in (name, *IMPORTS[name]):
        shutil.copy(ROOT / f"{copied}.py", folder)
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH")
    environment = {key: value for key, value in ENV.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, f"{name}.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", IMPORTS)
def test_a_method_file_imports_nothing_else_of_ours(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    ours = OUR_FILES | OUR_PACKAGES
    assert {"utils", "train", *IMPORTS} <= ours
    assert imported & ours == set(IMPORTS[name])


@pytest.mark.parametrize("name", [name for name in IMPORTS if name != "fid"])
def test_a_copied_method_file_runs_its_example(name, tmp_path):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    assert f"`python {name}.py`" in " ".join(docstring.split())
    done = run_copy(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_copied_fid_computes_the_fid_of_two_files_of_statistics(tmp_path):
    """With equal covariances the FID is the squared distance of the means: here 4 * 1.5^2 = 9."""
    covariance = np.diag([1.0, 2.0, 3.0, 4.0])
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=covariance)
    np.savez(tmp_path / "b.npz", mu=np.full(4, 1.5), sigma=covariance)
    done = run_copy("fid", tmp_path, "a.npz", "b.npz")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == ["fid"])
    assert float(line.split()[1]) == pytest.approx(9, abs=1e-4)
    assert "wrote a.fid.json" in done.stdout
    report = json.loads((tmp_path / "a.fid.json").read_text())
    assert report["values"] == {"fid": pytest.approx(9, abs=1e-6)}
    written = set(os.listdir(tmp_path)) - {"__pycache__"}
    assert written == {"fid.py", "a.npz", "b.npz", "a.fid.json"}
