"""What `commopt.attach` returns: one method in one training script."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Self

from commopt.errors import AttachError, check_option
from commopt.groups import Group
from commopt.method import Method
from commopt.record.recorder import Recorder, RoundReport
from commopt.run import checkpoint, reshare
from commopt.run.checks import ATTACHED, ATTACHING, Checked, check_parameters
from commopt.run.log import RunLog
from commopt.wire.state import Saved


class HasState(Protocol):
    """What a rank takes over with the training, such as a learning-rate schedule."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor], broadcast: Callable[[Tensor], object], device: str | None = None) -> None:
    """Overwrite tensors by those of the first rank; through a device, if one is given."""
    for x in tensors:
        if x.numel():
            flat = x.detach().to(device or x.device).contiguous().view(-1)
            broadcast(flat.view(torch.uint8))  # Gloo knows few dtypes
            x.copy_(flat.view_as(x))


class Replaced:
    """Replaces attributes of an object, its class's included, until `remove` restores them."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self._target, self._names = target, tuple(attributes)
        self._had = {name: vars(target)[name] for name in attributes if name in vars(target)}
        for name, value in attributes.items():
            setattr(target, name, value)

    def remove(self) -> None:
        for name in self._names:
            delattr(self._target, name)
        for name, value in self._had.items():
            setattr(self._target, name, value)


class Run(ABC):
    """One method in one training script; the same for every method and framework.

    run = commopt.attach(model, "onebit_adam", optimizer)
    for step in run.range(steps):
        ...
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.finish()

    Also a context manager, which finishes (unless an exception ended it) and closes.

    method, model, parameters (trainable, by name). optimizer: what steps. steps: optimizer steps done.
    rank, ranks: this rank's number in the job, and how many the job has. per_machine: ranks that share out what their machine exchanges.
    replica: the number of this rank's model among those that differ. traffic: the bytes that this rank has sent.
    voided: (step, parameter) for every bucket that a NaN or an inf on some rank made void; the same on all ranks, except for
        local steps, which exchange nothing: those are in the list of the rank that had the NaN.
    waited_s: seconds that this rank has waited for exchanges, without the parts that overlapped with backward.
    reports: the rounds of an outer method. events: what else happened, as (kind, fields).
    """

    method: Method

    def __init__(self, model: Module, checked: Checked, group: Group) -> None:
        self.model, self.method, self.optimizer = model, checked.method, checked.optimizer
        self.group, self._given = group, checked.request.group
        self.rank, self.ranks, self.per_machine, self.traffic = group.rank, group.size, group.per_machine, group.traffic
        self.replica = self.rank
        self.parameters = check_parameters(model, self.method, self.optimizer)
        self._known = {id(p) for p in self.parameters.values()}
        self._handles: list[Any] = []
        self.voided: list[tuple[int, str]] = []
        self.waited_s = 0.0
        self._norm: Tensor | float | None = None  # a tensor until someone asks: reading it makes the host wait
        self.steps = 0
        self.reports: list[RoundReport] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.is_closed = self.is_finished = False
        self._log = RunLog(self)

    @property
    def grad_norm(self) -> float | None:
        """The global L2 norm of the last step's unscaled gradient before clipping; None without max_norm, and before the first step.

        It is the norm that max_norm limits: that of the mean gradient if the exchange yields it, or if clipping follows the exchange
        (FSDP2, DeepSpeed); else the root mean square of the machines' norms, which is at least the norm of their mean. These are
        the same on all ranks. Under `dgc`, in local steps and under outer methods it is this machine's own. NaN if a gradient with
        a NaN or an inf was left out.
        """
        return None if self._norm is None else float(self._norm)

    def range(self, stop: int) -> Iterator[int]:
        """The steps that are left to do, up to `stop`; after `load` those that follow the checkpoint."""
        self._log.plan(stop)
        return iter(range(self.steps, stop))

    def join(self, *, step: int | None = None, wait_s: float = 60.0, **stateful: HasState) -> int:
        """Start with the other ranks; returns the step to continue from. Only outer methods wait for other ranks.

        In a new job they wait until all members are up, or for `wait_s`, and all get the parameters of the lowest rank. If a peer
        trains already, this rank takes over its parameters, the method's and the optimizer's state, the step, and the state of
        everything in `stateful` (such as a learning-rate schedule: anything with state_dict and load_state_dict).
        step: the optimizer steps that the script's own checkpoint has, which it has loaded into model and optimizer; the method
        begins there without state of its own.
        Raises GroupError if a restarted rank finds no such peer, or if its peers turn it away.
        """
        if step is not None:
            check_option(
                "step", step, lambda n: type(n) is int and n >= 0, "a whole number of optimizer steps, from 0 on"
            )
            if self.steps not in (0, step):
                raise AttachError(
                    f"join: step={step}, but this run has made or loaded {self.steps} steps; leave step out"
                )
            self.steps = step
        return self.steps

    def finish(self) -> None:
        """End the training: call it after the last step. Makes replicas that may differ equal, if the method does that."""
        if not self.is_finished:
            self.is_finished = True
            self._log.finish()

    def close(self) -> None:
        """Take the method out of the training script, and leave the job; waits a few seconds for unsent messages."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with ATTACHING:
            for one in (self.model, *self.model.parameters()):
                ATTACHED.pop(one, None)  # type: ignore[no-untyped-call]
        if not self.is_closed and self.group not in (self._given, getattr(self._given, "inside", None)):
            self.group.close()
        self.is_closed = True
        self._log.close()

    def save(self, folder: str | Path, *, extra: Mapping[str, object] | None = None) -> None:
        """Write a checkpoint from which training continues bit for bit; all ranks call it, between steps.

        extra: what else to store, such as a schedule's state_dict: numbers, texts, lists, dicts and tensors. Rank 0's is kept.
        A crash or a full disk leaves the previous checkpoint as it was. Raises CheckpointError, on all ranks.
        """
        checkpoint.save_run(Path(folder), self, extra or {})

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Continue from a checkpoint; returns the `extra` that was saved with it. Call it after attach, and before `join`.

        At the same number of ranks training continues bit for bit. At another, every rank takes the mean of what the old ranks still
        had to send. Raises CheckpointError, on all ranks and before anything is changed, if the checkpoint is damaged, or belongs to
        another model or method.
        """
        return checkpoint.open_run(Path(folder), self)()

    def log(self, **values: float | Tensor) -> None:
        """Record this step's values if the launcher wants them, else print some: `run.log(loss=..., tokens=...)`.

        Call it before every step, or after it, or in some steps only, on all ranks or on one; steps are recorded without it.
        loss: of this step. tokens: what this rank trained on in it. validation_loss: instead of `loss`, on `tokens` held out.
        """
        self._log.log(values)

    def note(self, **values: float | Tensor) -> None:
        """As `log`, if a launcher wants a record; else nothing, for frameworks that print for themselves."""
        if Recorder.is_wanted():
            self._log.log(values)

    def measure_compute(self, step: Callable[[], object], repeats: int = 20) -> None:
        """Time and record steps without communication, at a learning rate of 0: what a step costs without a network."""
        self._log.measure_compute(step, repeats)

    @contextmanager
    def communication_off(self) -> Iterator[None]:
        """Train this rank alone inside the block, to time arithmetic without the network.

        Replicas drift apart, and an update method's momentum with them: use it at the end of a run, or before loading a checkpoint.
        """
        with ExitStack() as at_end:
            at_end.callback(Replaced(self, **self._silenced()).remove)
            yield

    @abstractmethod
    def _silenced(self) -> dict[str, Any]:
        """The attributes of a run that exchanges nothing."""

    def replicas_are_equal(self) -> bool:
        """Whether every rank holds the same parameters, bit for bit, if the method promises that; all ranks must ask. Sends 32 bytes."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self.is_finished:
                self.finish()
        finally:
            self.close()

    def _attached(self, *handles: Any) -> None:
        """Follow the optimizer's steps from now on; handles: what else `close` removes."""
        with ATTACHING:
            ATTACHED.update(dict.fromkeys((self.model, *self.model.parameters())))
        self._handles += [
            *handles,
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_step_post_hook(self._log.stepped),
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        for group in self.optimizer.param_groups:
            if any(p.grad is not None and id(p) not in self._known for p in group["params"]):
                raise AttachError("a parameter that was frozen at attach has a gradient: close(), and attach again")

    @abstractmethod
    def _after_step(self, *_: Any) -> None:
        """Called when the optimizer has stepped."""

    # -- for checkpoints and the log

    buckets: Sequence[int] = ()  # elements of each bucket of the last step, in the order of their exchange
    overlaps = False  # whether they are exchanged during backward

    @property
    def replaced(self) -> torch.optim.Optimizer:
        """The user's optimizer, even if a stand-in steps in its place."""
        replaced: torch.optim.Optimizer = getattr(self.optimizer, "replaced", self.optimizer)
        return replaced

    lacks_state = False  # whether the optimizer's state has been loaded, and not yet the method's
    is_replica = False  # whether this machine's model is its own, and is saved by itself
    is_sharded = False  # whether each rank has shards of the model and of all state

    @property
    def savers(self) -> Group:
        """The ranks that write one checkpoint together."""
        return self.group

    saved_by = ""  # what writes checkpoints instead of `save`, if anything does

    def quiet(self) -> None:
        """Wait until no rank has messages in flight, so that counted bytes and those on the interface match."""
        self.group.barrier()

    def saved(self) -> Saved:
        """What a checkpoint must hold of the method."""
        return self.method.saved()

    def check_saved(self, saved: Saved) -> None:
        """Raise CheckpointError if `load_saved` would fail."""
        self.method.check_saved(saved)

    def load_saved(self, saved: Saved) -> None:
        """Continue bit for bit from what this rank saved."""
        self.method.load(saved)

    def resized(self, every: Sequence[Saved], per_machine: int) -> Callable[[], object]:
        """What continues from what all ranks of another world saved, machine after machine, of so many ranks each.

        Raises CheckpointError if that is impossible, and changes nothing yet.
        """
        return lambda: reshare.resize(self, every, per_machine)

    def bucket_layout(self) -> list[list[str]]:
        """The parameters of each bucket that was exchanged last, for a checkpoint; empty if it never changes."""
        return []

    def resume_bucket_layout(self, layout: list[list[str]]) -> None:
        """Exchange in these buckets until the framework has made the same ones: sums depend on the place of an element."""
