"""On a machine with one NVIDIA GPU: run tests/gpu, and time every Triton kernel and a training step under every method.

scripts/bench/gpu [--json FILE]       all of it, within 8 minutes; what does not fit is skipped, and named
scripts/bench/gpu --quick             fewer repeats and methods, within 3 minutes
scripts/bench/gpu --sections kernels,one-rank --methods ef_sign,powersgd
scripts/bench/gpu --pretend           all of it in miniature on the CPU, kernels in triton's interpreter: only to try the script

kernels     median of launches with nothing in the L2. The share is bytes that must be moved / time / the rate of a plain copy.
one-rank    GPT-2-small, 124 M parameters, bf16 autocast, random tokens, under DDP whose three other ranks are pretended: they send
            what this one sends, at once. So the step has all of the codecs' work for four ranks, and no network.
two-ranks   The same with half of the batch, in two processes on the one GPU, over Gloo through the host's memory.
x plain     The step's time over that of plain DDP with as large an optimizer, in the same run.
waits       How often the host waited for the GPU in a step: on the thread of the exchanges, once for each bucket, and on others. Of these,
            what the hook does on backward's thread is run once more in a mode in which any of torch's operations that waits fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from command import names

from commopt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"tests": ("pytest", "pytest_timeout", "hypothesis"), "kernels": ("triton",)}
BUDGET_S, QUICK_BUDGET_S = 480.0, 180.0
ENDS = {"tests": 0.45, "kernels": 0.6, "one-rank": 0.85, "two-ranks": 0.97}  # of the budget; what is left over goes on

Row = dict[str, Any]


class Bench:
    """What was found so far, and how much time there is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.is_quick, self.is_pretended, self.file = args.quick, args.pretend, args.json
        self.methods = known_cases(args.methods)
        self.device = torch.device("cpu" if args.pretend else "cuda:0")
        self.budget_s, self.begun = QUICK_BUDGET_S if args.quick else BUDGET_S, time.monotonic()
        self.found: dict[str, Any] = {
            "schema": 1,
            "pretended": args.pretend,
            "quick": args.quick,
            **machine(self.device),
        }
        self.found |= {"budget_s": self.budget_s, "problems": [], "skipped": []}

    def end(self, section: str) -> float:
        return self.begun + ENDS[section] * self.budget_s

    def is_late(self, section: str, needed_s: float = 0.0) -> bool:
        return time.monotonic() + needed_s > self.end(section)

    def skip(self, section: str, names: Iterable[str], why: str) -> None:
        if names := list(names):
            self.found["skipped"].append({"section": section, "names": names, "why": why})
            print(f"skipped, {why}: {', '.join(names)}", flush=True)

    def problem(self, section: str, text: str) -> None:
        self.found["problems"].append({"section": section, "text": text})
        print(f"FAILED, {section}: {text}", flush=True)

    def write(self) -> None:
        self.found["elapsed_s"] = time.monotonic() - self.begun
        if self.file is not None:
            self.file.write_text(json.dumps(self.found, indent=1))


def machine(device: torch.device) -> Row:
    """The card, and the versions that decide what runs on it."""
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}
    if device.type == "cpu":
        return {"card": None, **versions}
    card = torch.cuda.get_device_properties(device)
    kind = {"capability": f"{card.major}.{card.minor}", "multiprocessors": card.multi_processor_count}
    return {"card": card.name, **kind, "memory_bytes": card.total_memory, "cache_bytes": card.L2_cache_size, **versions}


# ---- the sections ----------------------------------------------------------------------------------------------------


def tests(bench: Bench) -> None:
    """tests/gpu, on a GPU with four workers if pytest-xdist is there, because most of the time is compilation."""
    run_tests(bench, "tests/gpu/test_pretend.py" if bench.is_pretended else "tests/gpu")


def run_tests(bench: Bench, place: str) -> None:
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") and not bench.is_pretended else []
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        file, log = Path(scratch, "found.xml"), Path(scratch, "log")
        words = [sys.executable, "-m", "pytest", place, *workers, "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
        limit_s = max(bench.end("tests") - time.monotonic(), 0)
        if not _ended(words, log, limit_s):
            bench.skip("tests", [place], f"no end within {limit_s:.0f} s")
            return
        if not file.exists():
            bench.problem("tests", "pytest: " + " ".join(log.read_text(errors="replace").splitlines()[-3:]))
            return
        cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in cases if _has(case, "failure", "error")]
    skipped = sum(_has(case, "skipped") for case in cases)
    counts = {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}
    bench.found["tests"] = {"place": place, **counts}
    print(f"{counts['passed']} passed, {len(failed)} failed, {skipped} skipped")
    for name in failed:
        bench.problem("tests", name)


def _ended(words: list[str], log: Path, limit_s: float) -> bool:
    """Run a program in the repository; False if it was ended, with all that it had started, because its time was up."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with log.open("w") as said:
        run = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=said, stderr=said, start_new_session=True)
        try:
            run.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return False
    return True


def _has(case: ElementTree.Element, *tags: str) -> bool:
    return any(case.find(tag) is not None for tag in tags)


def kernels(bench: Bench) -> None:
    from gpu_kernels import moved_bytes, timed

    numels = (2112, 64) if bench.is_pretended else (1 << 24, 1 << 23)  # 25 M elements, 100 MB
    repeats = 1 if bench.is_pretended else 5 if bench.is_quick else 20
    try:
        moved = moved_bytes()
    except Exception as error:
        moved = {}
        bench.problem("kernels", f"bytes are not known: {_first_line(error)}")
    print(f"{'codec':14} {'kernel':22} {'launches':>8} {'bytes/element':>13} {'microseconds':>12} {'x copy':>7}")
    rows: list[Row] = bench.found.setdefault("kernels", [])
    late = list[str]()
    for own in timed(bench.device, numels, repeats, moved, lambda: bench.is_late("kernels")):
        if isinstance(own, str):
            late.append(own)
            continue
        for row in own:
            print(
                f"{row['codec']:14} {row['kernel']:22} {row['launches']:8} {_or_dash(row['bytes_per_element'], '.2f'):>13} "
                f"{1e6 * row['seconds']:12.1f} {_or_dash(row['share_of_copy'], '.0%'):>7}",
                flush=True,
            )
            rows.append(row)
    bench.skip("kernels", late, "no time is left")


def one_rank(bench: Bench) -> None:
    import gpu_steps

    shape = gpu_steps.TINY if bench.is_pretended else gpu_steps.SMALL
    if not bench.is_pretended:
        shape = gpu_steps.fitting(shape, bench.device)
    rows = gpu_steps.one_rank(_cases(bench), shape, bench.device, _steps(bench))
    _steps_table(bench, "one-rank", shape.batch, rows)


def two_ranks(bench: Bench) -> None:
    import gpu_steps

    shape = gpu_steps.TINY if bench.is_pretended else gpu_steps.fitting(gpu_steps.SMALL, bench.device, ranks=2)
    rows = gpu_steps.two_ranks(_cases(bench), shape, bench.device, _steps(bench), bench.end("two-ranks"))
    _steps_table(bench, "two-ranks", shape.batch, rows)


def _cases(bench: Bench) -> list[Any]:
    """Those asked for, and what they are compared with."""
    import gpu_steps

    wanted = bench.methods or (gpu_steps.COMMON if bench.is_quick else None)
    cases = gpu_steps.all_cases()
    against = {case.against for case in cases if wanted is None or case.name in wanted}
    return [case for case in cases if wanted is None or case.name in wanted or case.name in against]


def _steps(bench: Bench) -> int:
    return 1 if bench.is_pretended else 5 if bench.is_quick else 10


def _steps_table(bench: Bench, section: str, batch: int, rows: Iterator[Row]) -> None:
    """Print rows as they come, until there is no time for one more."""
    left = {case.name: case for case in _cases(bench)}
    found: list[Row] = bench.found.setdefault("steps", [])
    plain: dict[str, float] = {}
    print(f"a batch of {batch} on each rank")
    print(f"{'case':18} {'ms':>8} {'x plain':>8} {'buckets':>8} {'waits: exchanges':>16} {'others':>7}  hook")
    longest_s, since = 0.0, time.monotonic()
    try:
        for row in rows:
            case = left.pop(row["case"])
            if row["case"].startswith("plain") and row["status"] == "ok":
                plain[row["case"]] = row["step_s"]
            against = plain.get(case.against, plain.get("plain"))
            row |= {"section": section, "batch": batch}
            row["ratio"] = row["step_s"] / against if row["status"] == "ok" and against else None
            found.append(row)
            print(_step_line(row), flush=True)
            if row["status"] == "failed":
                bench.problem(section, f"{row['case']}: {row['why']}")
            elif row.get("hook_waits"):
                bench.problem(section, f"{row['case']}: the hook let the host wait: {row['hook_waits']}")
            longest_s, since = max(longest_s, time.monotonic() - since), time.monotonic()
            if left and bench.is_late(section, longest_s):
                break
    finally:
        bench.skip(section, left, "no time is left")


def _step_line(row: Row) -> str:
    waits = row.get("host_waits") or {}
    hook = "-" if not waits or "hook_waits" not in row else "waits" if row["hook_waits"] else "never waits"
    return (
        f"{row['case']:18} {_or_dash(row.get('step_s'), '.1f', 1e3):>8} {_or_dash(row['ratio'], '.2f'):>8} "
        f"{row.get('buckets', '-'):>8} {waits.get('lane', '-'):>16} {waits.get('others', '-'):>7}  {hook}"
    )


def _or_dash(number: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if number is None else format(number * unit, form)


def known_cases(text: str | None) -> list[str]:
    """The names of cases in NAME,NAME,...; none for all. Raises ConfigError for one that is unknown."""
    from gpu_steps import all_cases

    return names("--methods", text, [case.name for case in all_cases()]) if text is not None else []


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "tests": tests,
    "kernels": kernels,
    "one-rank": one_rank,
    "two-ranks": two_ranks,
}


def main(words: list[str] | None = None) -> int:
    args = parser().parse_args(words)
    if not args.pretend and not torch.cuda.is_available():
        print(
            "scripts/bench/gpu: needs a GPU that torch can use; --pretend tries the script without one", file=sys.stderr
        )
        return 2
    if args.pretend:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    else:
        torch.cuda.set_device(0)
    sys.path.insert(1, str(ROOT / "tests"))
    try:
        bench, sections = Bench(args), names("--sections", args.sections, SECTIONS)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(", ".join(f"{key} {bench.found[key]}" for key in ("card", "torch", "cuda", "triton")))
    for section in sections:
        print(f"\n== {section}", flush=True)
        missing = [name for name in NEEDED.get(section, ()) if importlib.util.find_spec(name) is None]
        if missing:
            bench.skip(section, [section], "needs " + " and ".join(missing).replace("_", "-"))
            continue
        try:
            SECTIONS[section](bench)
        except Exception as error:  # the other sections may still tell something
            bench.problem(section, _first_line(error))
        bench.write()
    print(f"\n{bench.found['elapsed_s']:.0f} s, {len(bench.found['problems'])} problems")
    return 1 if bench.found["problems"] else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer repeats and methods, within 3 minutes")
    made.add_argument("--sections", metavar="NAME,...", help=f"of {', '.join(SECTIONS)}; all by default")
    made.add_argument(
        "--methods", metavar="NAME,...", help="steps only under these, and under plain DDP; all by default"
    )
    made.add_argument("--pretend", action="store_true", help="in miniature on the CPU; the times mean nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write all results there, after each section")
    return made


if __name__ == "__main__":
    sys.exit(main())
