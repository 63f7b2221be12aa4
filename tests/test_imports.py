"""What each module may import, and what an import must not load."""

from __future__ import annotations

import ast
import configparser
import graphlib
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import commopt
from commopt.errors import MissingExtra

PACKAGE = Path(commopt.__file__).parent
# each may import itself and what stands before it; the door of `run` finds frameworks by name
ROOMS = (
    *("errors", "secret", "options", "reading", "choice"),
    *("wire", "kernels", "compress", "plan", "groups", "exchange", "method"),
    *(
        "optim",
        "gossip",
        "methods",
        "record",
        "run",
        "frameworks",
        "deepspeed",
        "testing",
        "cluster",
        "report",
        "advise",
        "cli",
    ),
)
MAY_USE_TORCH_DISTRIBUTED = ("groups/torch.py", "run/", "frameworks/", "cluster/doctor.py")  # doctor tries it out


def sources() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def module_of(source: str) -> str:
    return ".".join(["commopt", *Path(source).with_suffix("").parts]).removesuffix(".__init__")


@cache
def imported(source: str, *, at_top: bool = False) -> set[str]:
    """Every module that a file imports, inside functions too unless `at_top`; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    tree = ast.parse((PACKAGE / source).read_text(encoding="utf-8"))
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(source: str) -> str:
    return source.split("/")[0].removesuffix(".py")


def test_rooms_import_only_what_lies_below_them() -> None:
    for source in (source for source in sources() if not room_of(source).startswith("__")):
        below = {"__version__", *ROOMS[: ROOMS.index(room_of(source)) + 1]}
        assert {name.split(".")[1] for name in imported(source) if name.startswith("commopt.")} <= below, source


def test_modules_import_each_other_in_no_circle() -> None:
    modules = {module_of(source): source for source in sources()}
    graph = {name: imported(source, at_top=True) & set(modules) - {name} for name, source in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_torch_distributed_stays_in_transports_runs_and_frameworks() -> None:
    for source in (source for source in sources() if not source.startswith(MAY_USE_TORCH_DISTRIBUTED)):
        used = [name for name in imported(source) if name.startswith(("torch.distributed", "torch._C._distributed"))]
        assert not used, source


OF_DEFAULT_DTYPE = [f"torch.{name}" for name in ("zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye")]


def test_no_tensor_takes_the_default_dtype_which_users_may_change() -> None:
    for source in (source for source in sources() if source != "testing.py"):  # whose tensors are a user's
        for node in ast.walk(ast.parse((PACKAGE / source).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in OF_DEFAULT_DTYPE:
                assert "dtype" in {keyword.arg for keyword in node.keywords}, f"{source}:{node.lineno}"


HEAVY = ("matplotlib", "typer", "rich", "pyroute2", "numba", "yaml", "triton")
FRAMEWORKS = ("deepspeed", "lightning", "pytorch_lightning", "accelerate", "transformers", "mpi4py")


LIGHT = (  # one after another, and what more each must not bring along
    ("import commopt, commopt.choice", ("torch", "pydantic")),
    ("import commopt.plan.simulate", ("torch", "pydantic")),
    ("import commopt.record.recorder", ("jinja2", "pydantic")),
    ("import commopt.methods, commopt.groups; commopt.build, commopt.attach, commopt.wrap", ()),
)


TRAINING = """
import sys, torch, commopt
model = torch.nn.Linear(8, 8)
run = commopt.attach(model, "onebit_adam", torch.optim.Adam(model.parameters()))
for _ in run.range(2):
    model(torch.ones(1, 8)).sum().backward()
    run.optimizer.step()
print(*(name for name in ("typer", "rich", "pyroute2", "matplotlib", "jinja2") if name in sys.modules))
"""


def test_training_needs_no_package_of_the_launcher_and_of_reports() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == []


def test_importing_brings_no_heavy_or_optional_package_along() -> None:
    unwanted = [(statement, (*HEAVY, *FRAMEWORKS, *more)) for statement, more in LIGHT]
    code = f"import sys\nfor statement, names in {unwanted!r}:\n"
    code += "    exec(statement)\n    print(*(name for name in names if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("module", "packages", "extra"),
    [
        ("commopt.frameworks.deepspeed", "deepspeed", "deepspeed"),
        ("commopt.frameworks.lightning", "lightning", "lightning"),
        ("commopt.frameworks.accelerate", "accelerate", "accelerate"),
        ("commopt.frameworks.transformers", "transformers accelerate", "transformers"),
        ("commopt.groups.mpi", "mpi4py", "mpi"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    module: str, packages: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FRAMEWORKS:  # as if none were installed, and nothing of ours had found them
        for known in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, known)
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(MissingExtra) as caught:
        importlib.import_module(module)
    fix = f"which is not installed: pip install {packages}"  # commopt itself is in no registry
    assert re.fullmatch(rf".* needs {packages.split()[0]}.*, {fix}", str(caught.value))
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    assert {line.split(">")[0] for line in config["options.extras_require"][extra].split()} == set(packages.split())


def test_public_names_exist() -> None:
    having = [source for source in sources() if "__all__" in (PACKAGE / source).read_text(encoding="utf-8")]
    assert len(having) >= 3
    for module in (importlib.import_module(module_of(source)) for source in having):
        assert all(hasattr(module, name) for name in module.__all__), module.__name__
