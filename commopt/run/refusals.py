"""What is refused, with what, why, and what to do instead: one table, from which the errors and a page of the docs come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from commopt.errors import AttachError
from commopt.method import Kind

_EVERY: tuple[Kind, ...] = ("gradient", "update", "outer")
_EVERY_STEP: tuple[Kind, ...] = ("gradient", "update")


@dataclass(frozen=True)
class Refusal:
    """One combination that cannot work.

    fact: by which a framework reports it. framework: where it is looked for. what, why, instead: the error; {method} is the
        method's name, and {detail} what the framework found. kinds: of methods that it concerns.
    """

    fact: str
    framework: str
    what: str
    why: str
    instead: str
    kinds: tuple[Kind, ...] = _EVERY

    def text(self, method: str, detail: object = "") -> str:
        """The error's text."""
        return f"{self.what}: {self.why}; {self.instead}".format(method=method, detail=detail)


REFUSALS = (
    Refusal(
        "max_norm of a private method",
        "any",
        "max_norm with {method}",
        "it clips each sample, or each rank's gradient, by itself",
        "leave max_norm out, and use the method's clip_norm",
    ),
    Refusal(
        "outer method and max_norm with a scaler",
        "any",
        "grad_scaler with {method}",
        "it exchanges no gradients, and a scaler skips steps on each rank alone",
        "leave grad_scaler out, and scale the loss as ever",
        kinds=("outer",),
    ),
    Refusal(
        "peers for a synchronous method",
        "any",
        "group: Peers with {method}",
        "it exchanges in every step, which needs a group with all ranks",
        "pass a Group, or use an outer method",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "overlap without backward",
        "any",
        "overlap=True with {detail}",
        "there is no exchange during backward",
        "leave overlap out",
    ),
    Refusal(
        "overlap with a joint decision",
        "ddp",
        "overlap=True with {detail}",
        "it needs the gradients of all buckets at once",
        "leave overlap out, or write overlap=False",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "plain scaler",
        "plain",
        "grad_scaler on several ranks without DDP",
        "GradScaler decides on each rank alone before the exchange",
        "wrap the model in DistributedDataParallel",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "ddp around an outer method",
        "ddp",
        "{method} on a DistributedDataParallel model",
        "DDP averages gradients in every step, and {method} is there to do without that",
        "attach to the model itself",
        kinds=("outer",),
    ),
    Refusal(
        "ddp mixed precision",
        "ddp",
        "DistributedDataParallel(mixed_precision=...)",
        "DDP casts gradients around the hook",
        "use torch.autocast instead",
    ),
    Refusal(
        "ddp hook",
        "ddp",
        "a DDP model with a communication hook",
        "DDP takes only one",
        "attach before registering others, and leave DDP's own out",
    ),
    Refusal(
        "ddp detached",
        "ddp",
        "a DDP model whose run was closed",
        "it keeps its hook for good",
        "make a new DistributedDataParallel(model.module), and attach to that",
    ),
    Refusal(
        "ddp other ranks",
        "ddp",
        "group: {detail}",
        "it has other ranks than DDP's own process group",
        "leave group out",
    ),
    Refusal(
        "ddp shared group",
        "ddp",
        "group: DDP's own process group",
        "it carries {detail} at the same time, in another order on each rank",
        "leave group out, or pass one over a new process group",
    ),
    Refusal(
        "compiled ddp",
        "ddp",
        "torch.compile around a DDP model",
        "the hook belongs to the DDP model inside",
        "attach to the DDP model first, then compile it",
    ),
)

_BY_FACT = {one.fact: one for one in REFUSALS}


def refuse(facts: Mapping[str, object], method: str, kind: Kind) -> None:
    """Raise AttachError for the first fact that holds and concerns a method of this kind.

    facts: by the table's names; the value is falsy, or the detail that the error shows.
    """
    for fact, detail in facts.items():
        refusal = _BY_FACT[fact]
        if detail and kind in refusal.kinds:
            raise AttachError(refusal.text(method, detail))
