"""The image and the four containers, without Docker: what the files say is carried out by hand."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launchers import ROOT, finish, start

import commopt
from commopt.cluster.emulate import links_json
from commopt.cluster.machine import free_ports
from commopt.cluster.spec import load_cluster


def instructions() -> list[tuple[str, str]]:
    """(keyword, the rest) of each line of the Dockerfile, comments left out and continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out: the last line that fits it, or a folder above it, decides."""
    answer = False
    places = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().lstrip("!")
        if pattern and not pattern.startswith("#"):
            names = [Path(place).name for place in places] if pattern.startswith("**/") else places
            if any("/" not in name and fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in names):
                answer = not line.startswith("!")
    return answer


def copied() -> dict[str, str]:
    """Where each source of a COPY goes in the image."""
    places = {}
    workdir = Path("/")
    for keyword, rest in instructions():
        workdir = Path(rest) if keyword == "WORKDIR" else workdir
        if keyword == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = workdir / target
                places[source] = str(place / source) if target.endswith("/") else str(place)
    return places


def test_the_image_gets_what_it_needs_and_nothing_else() -> None:
    files = ["LICENSE", "README.md", "commopt", "configs", "launch", "pyproject.toml", "setup.cfg", "setup.py"]
    assert sorted(copied()) == files
    for source in copied():
        assert (ROOT / source).exists()
        assert not ignored(source)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for path in [*tracked, ".venv/bin/python", "out/demo/report.html", ".git/config", "commopt/__pycache__/cli.pyc"]:
        wanted = any(path == source or path.startswith(f"{source}/") for source in copied())
        assert ignored(path) != (wanted and "__pycache__" not in path), path


def test_the_image_runs_as_an_ordinary_user() -> None:
    lines = instructions()
    assert lines[0][0] == "FROM"
    users = [rest for keyword, rest in lines if keyword == "USER"]
    assert users == ["1000:1000"]  # a number, which Kubernetes can tell from root's
    assert any(keyword == "RUN" and "useradd" in rest and "--uid 1000" in rest for keyword, rest in lines)
    after = lines[[keyword for keyword, _ in lines].index("USER") + 1 :]
    assert not any("pip install" in rest or "apt-get" in rest for _, rest in after)


def test_the_image_has_the_torch_that_the_tests_run_with_for_the_cpu_or_cuda() -> None:
    lines = instructions()
    arguments = dict(rest.split("=", 1) for keyword, rest in lines if keyword == "ARG")
    assert arguments["TORCH_INDEX"].endswith("/whl/cpu")
    assert f"torch=={arguments['TORCH_VERSION']}" in (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pips = [
        shlex.split(part) for keyword, rest in lines if keyword == "RUN" for part in rest.split("&&") if "pip " in part
    ]
    first = ["pip", "install", "--no-cache-dir", "--index-url", "$TORCH_INDEX", "torch==$TORCH_VERSION"]
    assert pips == [first, ["pip", "install", "--no-cache-dir", "/tmp/src"]]


def test_the_copied_files_are_a_whole_package(tmp_path: Path) -> None:
    """What pip would find at /tmp/src in the image, without the rest of the repository."""
    for source, place in copied().items():
        target = tmp_path / place.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, target, ignore=skip)
        else:
            shutil.copy(ROOT / source, target)
    others = [path for path in sys.path[1:] if Path(path) not in (ROOT, ROOT / "tests")]
    words = ["-c", "import commopt.cli.app; print(commopt.__file__, flush=True); commopt.cli.app.main()", "launch"]
    words += ["configs/clusters/four-50mbit.yaml", "--emulate", "none", "--print", "--", "launch/train.py"]
    path = os.pathsep.join([str(tmp_path / "tmp/src"), *others])
    code, output, errors = finish(start(words, tmp_path, sys.executable, tmp_path / "tmp/src", PYTHONPATH=path))
    assert code == 0, errors
    assert output.startswith(f"{tmp_path}/tmp/src/commopt/")
    assert output.count("launch/train.py") == 4
    assert os.access(tmp_path / "tmp/src/launch/torchrun.sh", os.X_OK)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "launch/compose.yaml").read_text())
    return found


def test_the_containers_find_each_other_by_name(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert list(services) == ["node0", "node1", "node2", "node3"]
    for number, (name, service) in enumerate(services.items()):
        environment = service["environment"]
        assert all(isinstance(value, str) for value in environment.values())  # compose takes no nested values
        assert (environment["HEAD"], environment["NODES"], environment["NODE"]) == ("node0", "4", str(number))
        assert set(service["networks"]) == set(compose["networks"])
        assert service.get("depends_on", []) == ([] if name == "node0" else ["node0"])  # else its name is not known yet
        assert (ROOT / "launch" / service["build"]["context"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
        assert service["image"] == f"commopt:{commopt.__version__.rpartition('.')[0]}"
        assert set(service["build"]["args"]) <= {rest.partition("=")[0] for key, rest in instructions() if key == "ARG"}
        assert "privileged" not in service


def test_the_containers_links_are_those_of_the_clusters_file(compose: dict[str, Any]) -> None:
    links = load_cluster(ROOT / "configs/clusters/four-50mbit.yaml").link_model()
    for service in compose["services"].values():
        assert " ".join(service["environment"]["COMMOPT_LINKS"].split()) == links_json(links)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("mark")
def test_the_containers_commands_train_together(compose: dict[str, Any], tmp_path: Path) -> None:
    """As processes on this machine, with a short training."""
    (port,) = free_ports(1)
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 400)
    sizes = {"steps": 2, "layers": 1, "heads": 1, "width": 8, "batch": 1, "validation-batches": 1, "corpus": text}
    short = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    nodes = []
    for service in compose["services"].values():
        given = {**service["environment"], "HEAD": "127.0.0.1", "PORT": str(port)}
        (program,) = service["entrypoint"]
        nodes.append(start([*service["command"], *short], tmp_path, program, ROOT, **given))
    ended = [finish(node) for node in nodes]
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert "4 ranks" in "".join(output + errors for _, output, errors in ended)  # from whichever became rank 0
