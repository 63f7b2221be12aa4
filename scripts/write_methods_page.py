"""Write docs/methods.md from the methods themselves: their docstrings, and the bytes that they say they send.

scripts/write_methods_page.py            write it        scripts/write_methods_page.py --check    only say whether it is up to date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from commopt.compress import COMPRESSORS, make_compressor
from commopt.methods import METHODS, OUTER_METHODS, build, is_outer_method, is_update_method

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
RANKS = (4, 16, 64)
EVERY: dict[str, type] = {**METHODS, **OUTER_METHODS}
REQUIRED: dict[str, dict[str, Any]] = {"threshold": {"threshold": 0.01}}  # options that have no default
STARTERS = {"sends": "Sends", "state": "State:", "use": "Use it", "avoid": "Not for"}

HEAD = """# Methods

Every name in this table is a `method:` in a run's YAML, and the first argument of `commopt.build`. Bytes are what one rank hands to
the network per parameter and optimizer step, once a warm-up is over, for large matrices and the options' defaults; a test
measures them. A float32 ring all-reduce, `dense`, is what DDP does without us.

- **gradient** methods replace the mean of the gradients, and go with an optimizer of yours.
- **update** methods are optimizers themselves: they exchange what their update is made of.
- **outer** methods exchange parameters or deltas every `every` steps of an optimizer of yours, among machines that may leave and come
  back: [outer.md](outer.md). Their bytes are per optimizer step too.

What each does to the loss: [convergence.md](convergence.md), and of the outer ones [outer-convergence.md](outer-convergence.md).

"""


@dataclass
class Page:
    """What a method's docstring says, by part."""

    summary: str
    source: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)


def read_docstring(method: type) -> Page:
    """Take a method's docstring apart. Raises SystemExit where a part is missing."""
    summary, _, rest = (inspect.getdoc(method) or "").partition("\n\n")
    body, _, options = rest.partition("\n\n")
    page = Page(" ".join(summary.split()))
    current = ""
    for line in body.splitlines():
        starter = next((key for key, word in STARTERS.items() if line.startswith(word)), "")
        current = starter or current
        if line.startswith("    ") and not current:
            page.equations.append(line[4:])
        elif current:
            page.facts[current] = f"{page.facts.get(current, '')} {line.strip()}".strip()
        else:
            (page.remarks if page.equations else page.source).append(line)
    for line in options.splitlines():
        if line.startswith("    ") and page.options:
            page.options[-1] += " " + line.strip()
        elif re.match(r"[\w, ]+:", line):
            page.options.append(line)
        elif page.options:
            page.options[-1] += " " + line
    if missing := [word for key, word in STARTERS.items() if key not in page.facts]:
        raise SystemExit(
            f"{method.__name__}: its docstring has no line that begins with {', '.join(map(repr, missing))}"
        )
    if not re.search(r"arXiv:\d{4}\.\d{4,5}|PyTorch|Strom 2015", body) and method.__name__ != "Dense":
        raise SystemExit(f"{method.__name__}: its docstring names no source")
    return page


def bytes_of(name: str) -> list[str]:
    """Bytes per parameter and step at each of RANKS, as text."""
    model = torch.nn.Linear(1024, 1024, bias=False, device="meta")
    method = build(name, model.named_parameters() if is_update_method(name) else None, **REQUIRED.get(name, {}))
    try:
        return [significant(method.bytes_per_parameter(n)) for n in RANKS]
    except NotImplementedError:
        return ["varies"] * len(RANKS)


def significant(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:.3g}" if x >= 0.001 else f"{x:.5f}"


def options_of(method: Any) -> list[str]:
    """The method's options with their defaults, as Python writes them."""
    parameters = inspect.signature(method.__init__).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in own]


def linked(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def render() -> str:
    """The whole page."""
    pages = {name: read_docstring(method) for name, method in EVERY.items()}
    lines = [
        HEAD,
        f"| method | family | {' | '.join(f'bytes, N = {n}' for n in RANKS)} | state |",
        "|---|---|--:|--:|--:|---|",
    ]
    for name, page in pages.items():
        family = "outer" if is_outer_method(name) else "update" if is_update_method(name) else "gradient"
        state = page.facts["state"].removeprefix("State:").strip().rstrip(".")
        short = re.split(r"[;:]|, in place of|, a half", state)[0]
        lines.append(f"| [`{name}`](#{name}) | {family} | {' | '.join(bytes_of(name))} | {short} |")
    lines += [
        "",
        "## Codecs",
        "",
        "What `two_way`, `ef` and `ef21` take, by name or as `{compressor: NAME, option: value}`:",
        "",
    ]
    lines += ["| name | bytes per element | what it is |", "|---|--:|---|"]
    for name, (kind, _) in COMPRESSORS.items():
        codec = make_compressor(name)
        cost = "varies" if codec.is_ragged else significant(codec.bytes_per_element(4))
        summary = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {cost} | {summary} |")
    for name, page in pages.items():
        lines += ["", f"## {name}", "", page.summary, ""]
        lines += [
            linked(page.facts["use"]),
            "",
            linked(page.facts["avoid"]),
            "",
            linked(page.facts["sends"]),
            "",
            page.facts["state"],
            "",
        ]
        lines += [linked(" ".join(page.source)), ""] if page.source else []
        lines += ["```text", *page.equations, "```", ""] if page.equations else []
        lines += [linked(" ".join(page.remarks)), ""] if page.remarks else []
        lines += ["Options and defaults: " + ", ".join(f"`{option}`" for option in options_of(EVERY[name])), ""]
        lines += [
            f"- {linked(re.sub(r'^([^:]+):', lambda m: marked(m[1]), option, count=1))}" for option in page.options
        ]
    return "\n".join(lines).rstrip() + "\n"


def marked(names: str) -> str:
    """`a, b` as code, with the colon."""
    return ", ".join(f"`{name.strip()}`" for name in names.split(",")) + ":"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    text = render()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is out of date; run scripts/write_methods_page.py")


if __name__ == "__main__":
    main()
