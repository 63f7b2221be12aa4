"""scripts/bench/gpu where there is no GPU: in miniature, and what it says of time, waits and failures."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from script import module

from commopt import build
from commopt.frameworks.ddp import DDPRun
from commopt.methods import METHODS, dense
from commopt.optim import make_optimizer

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("on a machine with a GPU run scripts/bench/gpu", allow_module_level=True)

gpu, steps, kernels = module("gpu"), module("gpu_steps"), module("gpu_kernels")
CPU = torch.device("cpu")


@pytest.fixture
def few_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only of two codecs: the interpreter is slow, and tests/kernels counts the bytes of all."""
    calls = kernels.calls
    monkeypatch.setattr(kernels, "calls", lambda numels: (one for one in calls(numels) if one[0] in ("sign", "int8")))
    kernels.counted.cache_clear()
    yield
    kernels.counted.cache_clear()


def bench(*words: str) -> Any:
    return gpu.Bench(gpu.parser().parse_args(["--pretend", *words]))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("few_kernels")
def test_in_miniature_it_measures_kernels_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    words = ["--pretend", "--sections", "kernels,one-rank,two-ranks", "--methods", "dense", "--json", str(file)]
    assert gpu.main(words) == 0
    found = json.loads(file.read_text())
    assert (found["schema"], found["pretended"], found["card"], found["problems"]) == (1, True, None, [])
    copy, *rows = found["kernels"]
    assert (copy["codec"], copy["share_of_copy"]) == ("copy", 1.0)
    assert {(row["codec"], row["kernel"]) for row in rows} == set(kernels.counted())
    assert all(row["seconds"] > 0 and row["launches"] >= 1 and row["bytes_per_element"] >= 0 for row in rows)
    timed = {(row["section"], row["case"]): row for row in found["steps"]}
    assert set(timed) == {(section, case) for section in ("one-rank", "two-ranks") for case in ("plain", "dense")}
    for (section, case), row in timed.items():
        assert (row["status"], row["batch"] > 0) == ("ok", True)
        assert row["ratio"] == row["step_s"] / timed[section, "plain"]["step_s"]
        assert case == "plain" or (row["steady"], row["buckets"], row["hook_waits"]) == (True, 1, "")
    said = capsys.readouterr().out
    assert all(text in said for text in ("quantize.compress", "== two-ranks", "dense", "0 problems"))


@pytest.mark.usefixtures("few_kernels")
def test_bytes_are_those_of_the_layout() -> None:
    """Values and residual, codes, scales of blocks, and the columns of the table that a piece needs."""
    nbytes = kernels.counted()
    assert nbytes["sign", "signs.compress"] == 3 * 4 + 1 / 8 + 4 / 2048 + 5 * 8 / 2048
    assert nbytes["sign", "signs.unpack"] == 2 * 4 + 1 / 8 + 4 / 2048 + 5 * 8 / 2048
    assert nbytes["int8", "quantize.compress"] == 3 * 4 + 1 + 4 / 256 + 7 * 8 / 256
    assert nbytes["int8", "quantize.decompress"] == 2 * 4 + 1 + 4 / 256 + 5 * 8 / 256


def test_every_method_can_be_made_and_is_past_its_warm_up() -> None:
    cases = steps.all_cases()
    assert {case.method for case in cases} >= {name for name, method in METHODS.items() if method.kind != "outer"}
    for case in cases:
        make_optimizer({"name": case.optimizer}, [torch.nn.Parameter(torch.zeros(2))])
        if case.method is not None:
            assert build(case.method, **case.options).warmup_steps <= steps.WARM_UP


@pytest.mark.usefixtures("few_kernels")
def test_what_does_not_fit_the_time_is_skipped_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    late = bench("--methods", "dense,fp16")
    late.budget_s = 0.0
    gpu.kernels(late)
    gpu.one_rank(late)
    gpu.two_ranks(late)
    assert [row["codec"] for row in late.found["kernels"]] == ["copy"]
    assert [row["case"] for row in late.found["steps"]] == ["plain"]
    skipped = {one["section"]: one["names"] for one in late.found["skipped"]}
    assert "int8" in skipped["kernels"]
    assert (skipped["one-rank"], skipped["two-ranks"]) == (["dense", "fp16"], ["plain", "dense", "fp16"])
    assert "no time is left: dense, fp16" in capsys.readouterr().out


def test_the_tests_that_fail_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('why')\n"
    )
    one = bench()
    gpu.run_tests(one, str(tmp_path / "test_x.py"))
    found = one.found["tests"]
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert [name.rpartition(".")[2] for name in found["failed"]] == ["test_b"]
    assert [problem["section"] for problem in one.found["problems"]] == ["tests"]


def test_tests_that_hang_are_ended_with_what_they_have_started(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import subprocess\ndef test_a(): subprocess.run(['sleep', '1234.25'])\n"  # which has pytest's output
    )
    one = bench()
    one.budget_s = 2.0 / gpu.ENDS["tests"]
    gpu.run_tests(one, str(tmp_path / "test_x.py"))
    assert [skipped["why"] for skipped in one.found["skipped"]] == ["no end within 2 s"]
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 1234.25" not in found.splitlines()


def test_a_case_that_fails_is_a_problem_and_the_next_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such thing\nmore")

    monkeypatch.setattr(dense.Dense, "exchange", fail)
    one = bench("--methods", "dense,fp16")
    gpu.one_rank(one)
    assert [row["status"] for row in one.found["steps"]] == ["ok", "failed", "ok"]
    (problem,) = one.found["problems"]
    assert problem["text"].startswith("dense: ")
    assert "no such thing" in problem["text"]


def test_waits_are_counted_by_thread() -> None:
    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)

    with steps.counted_waits() as found:
        wait()
        warnings.warn("something else", stacklevel=1)
        for _ in range(2):
            lane = threading.Thread(target=wait, name="commopt lane_0")
            lane.start()
            lane.join()
    assert found == {"lane": 2, "others": 1}


def test_the_hook_must_not_wait_and_its_exchange_may(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, seen, running = ["default"], list[tuple[str, str]](), list[str]()

    def alarm(new: str) -> None:
        time.sleep(0.01)  # in which an exchange that does not wait would begin
        assert not running, "an exchange would be disturbed"
        mode[0] = new

    def noting(place: str, inner: Any, takes_s: float) -> Any:
        def noted(*given: Any) -> Any:
            if takes_s:
                running.append(place)
                time.sleep(takes_s)
                running.pop()
            seen.append((place, mode[0]))
            return inner(*given)

        return noted

    monkeypatch.setattr(steps, "alarm", alarm)
    monkeypatch.setattr(DDPRun, "_wrap", noting("hook", DDPRun._wrap, 0.0))
    monkeypatch.setattr(dense.Dense, "exchange", noting("exchange", dense.Dense.exchange, 0.05))
    shape = steps.replace(steps.TINY, layers=3, width=256)  # several buckets
    (row,) = steps.one_rank([steps.Case("dense", "dense")], shape, CPU, 1)
    assert (row["status"], row["hook_waits"]) == ("ok", "")
    assert row["buckets"] > 1
    guarded = seen[-2 * row["buckets"] :]
    assert set(guarded) == {("hook", "error"), ("exchange", "default")}
    assert {(place, was) for place, was in seen if place == "hook"} == {("hook", "default"), ("hook", "error")}
    assert mode == ["default"]

    def waits(*_: object) -> None:
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(DDPRun, "note_backward", waits)
    (row,) = steps.one_rank([steps.Case("dense", "dense")], shape, CPU, 1)
    assert row["status"] == "ok"
    assert "called a synchronizing CUDA operation" in row["hook_waits"]
