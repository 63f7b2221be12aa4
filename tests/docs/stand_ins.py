"""Stand-ins for programs that pages call and tests must not: they check their arguments, and do nothing.

stand_ins.py pip install 'commopt[lightning]'
"""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)(?:\[([\w,\s-]+)\])?\s*([<>=!~].*)?")


def fail(text: str) -> SystemExit:
    """How a stand-in ends when the page is wrong."""
    return SystemExit(f"stand-in: {text}")


def pip(words: Sequence[str]) -> None:
    """`pip install [-e]`: the extras exist, and the packages are in setup.cfg or installed here."""
    if not words or words[0] != "install":
        raise fail(f"pip {shlex.join(words)}: only 'pip install' is known here")
    wanted = [word for word in words[1:] if word != "-e"]
    for word in wanted:
        if word.startswith("-"):
            raise fail(f"pip: {word}: no option that is known here")
        _requirement(word)
    if not wanted:
        raise fail("pip install: nothing to install")


def _requirement(word: str) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = dict(config["options.extras_require"])
    if word.startswith("."):
        word = "commopt" + word[1:].removeprefix("/")
    found = _REQUIREMENT.fullmatch(word)
    if found is None:
        raise fail(f"pip: {word!r} is no requirement")
    name, chosen = found[1].lower(), [extra.strip() for extra in (found[2] or "").split(",") if extra.strip()]
    if name == "commopt":
        for extra in chosen:
            if extra not in extras:
                raise fail(f"pip: commopt has no extra {extra!r}; it has {', '.join(sorted(extras))}")
        return
    lines = "\n".join([config["options"]["install_requires"], *extras.values()]).splitlines()
    known = {match[1].lower() for line in lines if (match := _REQUIREMENT.fullmatch(line.strip()))}
    if name in known:
        return
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise fail(f"pip: {name} is neither in setup.cfg nor installed here") from None


def sbatch(words: Sequence[str]) -> None:
    """`sbatch [options] SCRIPT [arguments]`: the script exists, is a shell script that parses, and asks for nodes."""
    rest = _without_options(words, takes_value="NnptAJcod")
    if not rest:
        raise fail("sbatch: no script")
    script = _shell_script(rest[0])
    if not re.search(r"^#SBATCH\s+-", script.read_text(encoding="utf-8"), re.MULTILINE):
        raise fail(f"sbatch: {rest[0]} has no #SBATCH line")


def ssh(words: Sequence[str]) -> None:
    """`ssh [options] HOST [command]`: there is a host, and the command is one that bash reads."""
    rest = _without_options(words, takes_value="pilLRoJ")
    if not rest or not re.fullmatch(r"[\w.@-]+", rest[0]):
        raise fail(f"ssh: {rest[0] if rest else ''!r} is no host")
    _parses(" ".join(rest[1:]))


def kubectl(words: Sequence[str]) -> None:
    """`kubectl VERB ...`: the verb exists, and each file of -f holds manifests."""
    verbs = ("apply", "create", "delete", "get", "logs", "describe", "wait", "exec", "cp", "scale", "port-forward")
    if not words or words[0] not in verbs:
        raise fail(f"kubectl {shlex.join(words[:1])}: no verb that is known here; {', '.join(verbs)}")
    files = [words[k + 1] for k, word in enumerate(words[:-1]) if word in ("-f", "--filename")]
    if words[0] in ("apply", "create") and not files:
        raise fail(f"kubectl {words[0]}: no file; write -f FILE")
    if words[0] != "logs":  # where -f follows
        for name in files:
            _check_kind("kubectl", name, "manifest")


def docker(words: Sequence[str]) -> None:
    """`docker build|run|compose|push|images|ps`: the Dockerfile or the compose file exists, and an image has a name."""
    if not words or words[0] not in ("build", "run", "compose", "push", "images", "ps"):
        raise fail(f"docker {shlex.join(words[:1])}: only build, run, compose, push, images and ps are known here")
    if words[0] == "build":
        file = next((words[k + 1] for k, word in enumerate(words[:-1]) if word in ("-f", "--file")), None)
        context = words[-1]
        if context.startswith("-") or not _place(context).is_dir():
            raise fail(f"docker build: {context!r} is not a folder to build in")
        text = _file(file or str(Path(context) / "Dockerfile")).read_text(encoding="utf-8")
        if not re.search(r"^FROM \S+", text, re.MULTILINE):
            raise fail("docker build: the Dockerfile has no FROM")
    elif words[0] == "compose":
        name = next((words[k + 1] for k, word in enumerate(words[:-1]) if word in ("-f", "--file")), "compose.yaml")
        _check_kind("docker compose", name, "compose")
    elif words[0] in ("run", "push"):
        long = ("--env", "--gpus", "--name", "--network", "--volume")
        if not _without_options(words[1:], takes_value="vewpuh", long_takes_value=long):
            raise fail(f"docker {words[0]}: no image")


def _without_options(words: Sequence[str], takes_value: str, long_takes_value: Sequence[str] = ()) -> list[str]:
    """What follows the options: `--key=value`, `--flag`, `-x`, `-xVALUE`, and `-x VALUE` where x is in takes_value."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        takes = word in long_takes_value or (len(word) == 2 and word[1] in takes_value)
        if takes and rest:
            rest.pop(0)
    return rest


def _shell_script(name: str) -> Path:
    path = _file(name)
    if not path.read_text(encoding="utf-8").startswith("#!"):
        raise fail(f"{name}: does not begin with #!")
    _parses(path.read_text(encoding="utf-8"))
    return path


def _parses(script: str) -> None:
    read = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
    if read.returncode != 0:
        raise fail(read.stderr.strip())


def _check_kind(who: str, name: str, wanted: str) -> None:
    from checks import check_file  # imports torch, which few of these programs need

    if (kind := check_file(_file(name))) != wanted:
        raise fail(f"{who}: {name} is a {kind}, no {wanted}")


def _place(name: str) -> Path:
    """A path in the reader's folder or, as the page is about a checkout, in the repository."""
    return Path(name) if Path(name, "Dockerfile").exists() or Path(name).is_file() else ROOT / name


def _file(name: str) -> Path:
    path = _place(name)
    if not name or not path.is_file():
        raise fail(f"{name!r}: no such file")
    return path


_STAND_INS: dict[str, Callable[[Sequence[str]], None]] = {
    "pip": pip,
    "sbatch": sbatch,
    "ssh": ssh,
    "kubectl": kubectl,
    "docker": docker,
}

if __name__ == "__main__":
    _STAND_INS[sys.argv[1]](sys.argv[2:])
