"""The pages of the site that are written from the code: methods, from their docstrings and declarations, and refusals, from their table.

mkdocs calls `on_files` when it builds the site (see mkdocs.yml); `python scripts/site_pages.py methods` prints a page.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from commopt.compress import COMPRESSORS, make_compressor
from commopt.groups import LocalGroup, SimGroup, SimWorld
from commopt.method import Method
from commopt.methods import METHODS, build
from commopt.optim import LAMB, Lion
from commopt.optim.update import UpdateMethod
from commopt.run.checks import table

RANKS = (4, 16, 64)
REQUIRED: dict[str, dict[str, Any]] = {"threshold": {"threshold": 0.01}}  # options that have no default
STARTERS = {"sends": "Sends", "state": "State:", "use": "Use it", "avoid": "Not for"}
FRAMEWORKS = {
    "any": "With every framework",
    "plain": "A plain module",
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDP",
    "deepspeed": "DeepSpeed",
    "lightning": "Lightning",
    "accelerate": "Accelerate",
    "transformers": "Hugging Face Trainer",
}
PROPER = {"ddp": "DDP", "fsdp": "FSDP", "deepspeed": "DeepSpeed", "lightning": "Lightning", "accelerate": "Accelerate"}
SAMPLE = 1024  # rows and columns of the matrix that bytes are worked out for

HEAD = """# Methods

Every name in this table is a `method:` in a run's YAML, and the first argument of `commopt.build`. Bytes are what one rank hands to
the network per parameter and optimizer step, once a warm-up is over, for large matrices and the options' defaults; a test
measures them. A float32 ring all-reduce, `dense`, is what DDP does without us.

- **gradient** methods replace the mean of the gradients; your optimizer steps.
- **update** methods stand in for your optimizer: they exchange what its update is made of. Learning rate, betas, eps and weight
  decay stay those of your optimizer.
- **outer** methods exchange parameters or deltas every `every` steps of your optimizer, among machines that may leave and come
  back: [Outer methods](outer.md). Their bytes are per optimizer step too.

State is what one rank keeps per parameter beside weights and your optimizer's own state, on 4 ranks, from each method's declaration.

Losses: [What compression does to the loss](convergence.md); of outer methods: [What rare averaging does to the loss](outer-convergence.md).

"""


@dataclass
class Page:
    """What a method's docstring says, by part. body: paragraphs and blocks of equations, in their order."""

    summary: str
    body: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)


def read_docstring(method: type) -> Page:
    """Take a method's docstring apart. Raises ValueError if a part is missing."""
    summary, _, rest = (inspect.getdoc(method) or "").partition("\n\n")
    body, _, options = rest.partition("\n\n")
    page = Page(" ".join(summary.split()))
    current, was_equation = "", False
    for line in body.splitlines():
        current = next((key for key, word in STARTERS.items() if line.startswith(word)), current)
        is_equation = line.startswith("    ") and not current
        if current:
            page.facts[current] = f"{page.facts.get(current, '')} {line.strip()}".strip()
        elif page.body and is_equation == was_equation:
            page.body[-1] += f"\n{line[4:]}" if is_equation else f" {linked(line)}"
        else:
            page.body.append(f"```text\n{line[4:]}" if is_equation else linked(line))
        was_equation = is_equation
    page.body = [f"{part}\n```" if part.startswith("```text") else part for part in page.body]
    for line in options.splitlines():
        if line.startswith("    ") and page.options:
            page.options[-1] += " " + line.strip()
        elif re.match(r"[\w, ]+:", line):
            page.options.append(line)
        elif page.options:
            page.options[-1] += " " + line
    if missing := [word for key, word in STARTERS.items() if key not in page.facts]:
        raise ValueError(
            f"{method.__name__}: its docstring has no line that begins with {', '.join(map(repr, missing))}"
        )
    if not re.search(r"arXiv:\d{4}\.\d{4,5}|PyTorch|Strom 2015", body):
        raise ValueError(f"{method.__name__}: its docstring names no source")
    return page


def bytes_of(method: Method) -> list[str]:
    """Bytes per parameter and step at each of RANKS, as text."""
    try:
        return [significant(method.bytes_per_parameter(n)) for n in RANKS]
    except NotImplementedError:
        return ["varies"] * len(RANKS)


def state_bytes(name: str, ranks: int = RANKS[0]) -> float:
    """Bytes of declared state per parameter on one of `ranks` ranks, for a large matrix."""
    method: Any = build(name, **REQUIRED.get(name, {}))
    parameter = torch.nn.Parameter(torch.zeros(SAMPLE, SAMPLE))
    if isinstance(method, UpdateMethod):
        kinds: dict[str, Any] = {"AdamW": torch.optim.AdamW, "LAMB": LAMB, "Lion": Lion, "SGD": torch.optim.SGD}
        kind = next(kinds[key] for key in kinds if key in method.stands_for)
        method.follow(kind([parameter], lr=0.1), {"x": parameter})
    if method.kind == "outer":
        method.bind([("x", parameter)], SimGroup(SimWorld[None](ranks), 0).peers)
    else:
        group = LocalGroup()
        group.size = ranks
        method.bind([("x", parameter)], group)
    return float(method.state_bytes() / parameter.numel())


def significant(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:.3g}" if x >= 0.001 else f"{x:.5f}"


def options_of(method: type[Method]) -> list[str]:
    """The method's options with their defaults, as Python writes them."""
    fields = dataclasses.fields(method.Options)
    return [one.name if one.default is dataclasses.MISSING else f"{one.name}={one.default!r}" for one in fields]


def linked(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def methods_page() -> str:
    """The page about every method."""
    pages = {name: read_docstring(method) for name, method in METHODS.items()}
    lines = [
        HEAD,
        f"| method | kind | {' | '.join(f'bytes, N = {n}' for n in RANKS)} | state |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name in pages:
        method = build(name, **REQUIRED.get(name, {}))
        cells = [*bytes_of(method), f"{round(state_bytes(name), 1):g}"]
        lines.append(f"| [`{name}`](#{name}) | {method.kind} | {' | '.join(cells)} |")
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
        for part in page.body:
            lines += [part, ""]
        if own := options_of(METHODS[name]):
            lines += ["Options and defaults: " + ", ".join(f"`{option}`" for option in own), ""]
        names = "|".join(one.name for one in dataclasses.fields(METHODS[name].Options))
        options = [one for line in page.options for one in re.split(rf"(?<=\.) (?=(?:{names}): )", line)]
        lines += [f"- {linked(re.sub(r'^([^:]+):', lambda m: marked(m[1]), option, count=1))}" for option in options]
    return "\n".join(lines).rstrip() + "\n"


def marked(names: str) -> str:
    """`a, b` as code, with the colon."""
    return ", ".join(f"`{name.strip()}`" for name in names.split(",")) + ":"


def refusals_page() -> str:
    """The page about what is refused: a table for each framework."""
    lines = [
        "# What is refused",
        "",
        "commopt checks everything before it changes anything, on every rank, and raises `AttachError` for a combination that cannot work.",
        "The error says what to do instead. The checks read these tables; `...` stands for what they found.",
    ]
    for framework, title in FRAMEWORKS.items():
        lines += ["", f"## {title}", "", "| refused | methods | because | instead |", "|---|---|---|---|"]
        for one in (one for one in table().values() if one.framework == framework):
            kinds = "all" if len(one.kinds) == 3 else ", ".join(one.kinds)
            what = one.what.removeprefix("{detail}: ").replace(" ({detail})", "")
            if "{detail}" in what or len(what) <= len("this {method}"):  # says little without what was found
                what = re.sub(r"\w+", lambda word: PROPER.get(word[0], word[0]), one.fact)
            cells = (what, kinds, one.why, one.instead)
            lines.append(f"| {' | '.join(map(filled, cells))} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """A refusal's text for any method."""
    text = text.replace("'{method}'", "METHOD").replace("{method!r}", "METHOD")
    return breakable(text.format(method="the method", detail="...").replace("|", "\\|"))


def breakable(text: str) -> str:
    """The text with places in its long words where a browser may break them."""
    return re.sub(r"\S{30,}", lambda word: re.sub(r"(?<=[(.=])(?=\w)", "<wbr>", word[0]), text)


PAGES = {"methods": methods_page, "refusals": refusals_page}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those that mkdocs has found."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, f"{name}.md", content=page()))
    return files


if __name__ == "__main__":
    print(PAGES[sys.argv[1]]())
