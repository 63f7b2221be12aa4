"""What is compiled before ranks start, and by which process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from presets import PRESETS, Preset

from commopt import kernels
from commopt.choice import Choice
from commopt.groups import SimGroup, SimWorld
from commopt.methods import build
from commopt.run.prepare import _bind, prepare, prepare_all

COMPILED = [
    *PRESETS,
    *(Preset(name) for name in ("two_way(int8)", "two_way(4bit)", "ef(int8)", "two_way(sign_l2)")),
    Preset("onebit_adam", {"freeze_step": 2, "scale": "l2"}, {"name": "adam", "lr": 0.01}),
]


@pytest.mark.parametrize("preset", COMPILED, ids=str)
def test_steps_call_no_kernel_that_bind_has_not_called(preset: Preset) -> None:
    kernels.load_cpu()
    from commopt.kernels.cpu import ahead

    def train(group: SimGroup) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(13, 40), torch.nn.Linear(40, 5))
        run = preset.attach(model, group)
        for _ in run.range(8):
            model(torch.randn(4, 13)).square().mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    with ahead.noted() as at_bind:
        SimWorld[None](2).run(lambda group: _bind(preset.method(), group))
    with ahead.noted() as in_steps:
        SimWorld[None](2).run(train)
    assert set(in_steps) <= set(at_bind)


def test_a_method_needs_its_own_kernels_only() -> None:
    assert calls("dense") == set()
    assert calls("onebit_adam") == {"apply.move", "signs.compress", "signs.unpack"}
    assert calls({"name": "noloco", "message": "int8"}) == {"encoding.compress", "decoding.decompress"}


def calls(choice: Choice) -> set[str]:
    kernels.load_cpu()
    from commopt.kernels.cpu import ahead

    with ahead.noted() as found:
        SimWorld[None](2).run(lambda group: _bind(build(choice), group))
    return {kernel._cache.name for kernel, _ in found}


def test_preparing_tells_what_it_compiles_and_leaves_nothing_to_compile(tmp_path: Path) -> None:
    code = "from commopt.run.prepare import prepare; from commopt.methods import build"
    code += "; prepare([build('dense'), build('distributed_lion')], print)"
    first, second = (python(code, tmp_path) for _ in range(2))
    assert first[0] == "compiling 2 kernels, once on this machine"
    assert first[-1].startswith("compiled 2 of 2 kernels in ")
    assert second == []


def test_processes_that_need_a_kernel_at_once_compile_it_once(tmp_path: Path) -> None:
    code = "from commopt.kernels.cpu import signs; import numba as n; k = signs._sums; f = n.float32[::1]; i = n.int64[::1]"
    code += "; k.compile((f, f, n.types.UniTuple(i, 3), n.boolean, n.float64[::1])); print(sum(k.stats.cache_misses.values()))"
    started = [start(code, tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=100) for process in started]
    assert sorted(out.strip() for out, _ in said) == ["0", "0", "1"]
    errors = "".join(err for _, err in said)
    assert "compiling kernels, once on this machine: signs." in errors


def start(code: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def python(code: str, cache: Path) -> list[str]:
    process = start(code, cache)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output.splitlines()


def test_all_methods_can_be_prepared() -> None:
    prepare_all(lambda _: None)
    told: list[str] = []
    prepare([build(name) for name in ("ef_sign", "two_way(int8)", "dgc", "signum", "demo")], told.append)
    assert told == []
