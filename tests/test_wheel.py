"""What `pip install commopt-*.whl` installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launchers import ROOT, commopt_here, finish, start

SOURCES = ("LICENSE", "README.md", "commopt", "configs", "launch", "pyproject.toml", "setup.cfg", "setup.py")
DEMO = ("demo", "--emulate", "none", "--print")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel that was built from a checkout, and nothing else of commopt."""
    copy, wheels = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheels")
    for source in SOURCES:
        whole = (ROOT / source).is_dir()
        (shutil.copytree if whole else shutil.copy)(ROOT / source, copy / source)
    words = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"]
    subprocess.run(words, cwd=copy, capture_output=True, check=True, timeout=100)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(wheels / "site")
    return wheels / "site"


def programs(output: str) -> set[Path]:
    """The programs that `--print` shows."""
    return {Path(word) for word in re.findall(r"\S+/launch/train\.py", output)}


def test_the_demo_of_a_wheel_runs_what_the_wheel_carries(installed: Path, tmp_path: Path) -> None:
    others = [path for path in sys.path[1:] if Path(path) not in (ROOT, ROOT / "tests")]
    code = "import sys, commopt.cli; sys.argv[1:] = " + repr(DEMO) + "; commopt.cli.main()"
    path = os.pathsep.join([str(installed), *others])
    status, output, errors = finish(start(["-c", code], tmp_path, sys.executable, tmp_path, PYTHONPATH=path))
    assert status == 0, errors
    assert output.count("# method ") == 3
    assert programs(output) == {installed / "commopt/launch/train.py"}
    assert (installed / "commopt/launch/train.py").read_bytes() == (ROOT / "launch/train.py").read_bytes()


def test_the_demo_of_a_checkout_runs_what_is_beside_the_package() -> None:
    status, output, errors = commopt_here(*DEMO, "--methods", "fp16")
    assert status == 0, errors
    assert output.count("# method ") == 1
    assert programs(output) == {ROOT / "launch/train.py"}


def test_the_wheel_has_every_package(installed: Path) -> None:
    ours = {path.relative_to(ROOT) for path in (ROOT / "commopt").rglob("*.py")}
    assert ours == {
        path.relative_to(installed)
        for path in (installed / "commopt").rglob("*.py")
        if path.relative_to(installed).parts[1] != "launch"
    }


def test_the_wheel_has_every_file_that_a_module_reads(installed: Path) -> None:
    read = [path for kind in ("json", "html", "yaml") for path in (ROOT / "commopt").rglob(f"*.{kind}")]
    assert read
    assert [path for path in read if not (installed / path.relative_to(ROOT)).is_file()] == []
