"""Stand-ins for programs that pages call and tests must not: they check their arguments, and do nothing.

stand_ins.py pip install '.[mpi]'
"""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import dropwhile, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OURS = re.compile(r"\.(?:\[(\w+)\])?")


def fail(text: str) -> SystemExit:
    """How a stand-in ends when the page is wrong."""
    return SystemExit(f"stand-in: {text}")


def pip(words: Sequence[str]) -> None:
    """`pip install [-e] .[EXTRA]`: the extra exists. commopt itself is in no registry. An MPI library is."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = sorted(config["options.extras_require"])
    wanted = [word for word in words[1:] if word != "-e"]
    if words[:1] != ["install"] or not wanted:
        raise fail(f"pip {shlex.join(words)}: only 'pip install' of something is known here")
    for word in wanted if wanted != ["mpich"] else []:
        found = _OURS.fullmatch(word)
        if found is None:
            raise fail(f"pip: {word} is not a checkout of commopt")
        if found[1] and found[1] not in extras:
            raise fail(f"pip: commopt has no extra {found[1]!r}; it has {', '.join(extras)}")


def sbatch(words: Sequence[str]) -> None:
    """`sbatch [--key=value] SCRIPT [arguments]`: the script exists, is a shell script that parses, and asks for nodes."""
    name, *_ = [*_without_options(words), ""]
    text = _text(name)
    if not text.startswith("#!"):
        raise fail(f"{name}: does not begin with #!")
    _parses(text)
    if not re.search(r"^#SBATCH\s+-", text, re.MULTILINE):
        raise fail(f"sbatch: {name} has no #SBATCH line")


def ssh(words: Sequence[str]) -> None:
    """`ssh HOST command`: there is a host, and the command is one that bash reads."""
    if not words or not re.fullmatch(r"[\w.@-]+", words[0]):
        raise fail(f"ssh {shlex.join(words[:1])}: no host")
    _parses(" ".join(words[1:]))


def kubectl(words: Sequence[str]) -> None:
    """`kubectl apply -f FILE` or `kubectl logs ...`: the file holds manifests."""
    if words[:1] not in (["apply"], ["logs"]):
        raise fail(f"kubectl {shlex.join(words[:1])}: only apply and logs are known here")
    if words[0] == "apply":
        _check_kind(_file_of(words), "manifest")


def docker(words: Sequence[str]) -> None:
    """`docker build|run|push|compose`: the Dockerfile or the compose file exists, and an image has a name."""
    if words[:1] == ["build"]:
        if not (ROOT / words[-1]).is_dir():
            raise fail(f"docker build: {words[-1]!r} is not a folder to build in")
        if not re.search(r"^FROM \S+", _text(str(ROOT / words[-1] / "Dockerfile")), re.MULTILINE):
            raise fail("docker build: the Dockerfile has no FROM")
    elif words[:1] == ["compose"]:
        _check_kind(_file_of(words), "compose")
    elif words[:1] not in (["run"], ["push"]) or not _without_options(words[1:]):
        raise fail(f"docker {shlex.join(words)}: only build, compose, and run and push of an image are known here")


def _without_options(words: Sequence[str]) -> list[str]:
    return list(dropwhile(lambda word: word.startswith("-"), words))


def _file_of(words: Sequence[str]) -> str:
    """FILE in `-f FILE`."""
    return next((name for key, name in pairwise(words) if key == "-f"), "")


def _parses(script: str) -> None:
    read = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
    if read.returncode != 0:
        raise fail(read.stderr.strip())


def _check_kind(name: str, wanted: str) -> None:
    from checks import check_file  # imports torch, which few of these programs need

    _text(name)
    if (kind := check_file(Path(name))) != wanted:
        raise fail(f"{name} is a {kind}, no {wanted}")


def _text(name: str) -> str:
    if not Path(name).is_file():
        raise fail(f"{name!r}: no such file")
    return Path(name).read_text(encoding="utf-8")


_STAND_INS: dict[str, Callable[[Sequence[str]], None]] = {
    "pip": pip,
    "sbatch": sbatch,
    "ssh": ssh,
    "kubectl": kubectl,
    "docker": docker,
}

if __name__ == "__main__":
    _STAND_INS[sys.argv[1]](sys.argv[2:])
