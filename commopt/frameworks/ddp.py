"""A method as the communication hook of DistributedDataParallel."""

import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist  # initialises the module below
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice
from commopt.errors import GradientsChanged, GroupError
from commopt.exchange.watch import Waits
from commopt.frameworks.lane import Lane, carriers, threads_of
from commopt.groups import Group, TorchGroup, World
from commopt.groups.torch import device_of
from commopt.method import EveryStep, Method
from commopt.methods import chosen, resolve
from commopt.plan.links import schedule
from commopt.run import checks
from commopt.run.agree import meeting_group
from commopt.run.every_step import EveryStepRun
from commopt.run.machine import Machine
from commopt.run.outer import OuterRun
from commopt.run.run import Run
from commopt.wire.bucket import Bucket


class DDPRun(EveryStepRun):
    """Averages bucket by bucket during backward (overlap), or all buckets together when backward reaches the last."""

    repeat_hint = "run the other backwards under model.no_sync()"

    def __init__(self, model: DistributedDataParallel, checked: checks.Checked, group: Group, overlap: bool) -> None:
        super().__init__(model.module, checked, group)
        self._name_of = {id(p): name for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        self._waits = Waits(device)
        self._lane, self.overlaps = Lane(device, group) if overlap else None, overlap
        self._collected: list[tuple[Bucket, Future[Tensor]]] = []
        self._failure: GroupError | None = None
        self._may_be_unused = bool(model.find_unused_parameters or model.static_graph)
        self._ddps_own = list(_ddps_own(model))
        self._layout: dict[int, tuple[str, ...]] = {}
        self._cuts: dict[tuple[int, ...], tuple[tuple[str, ...], tuple[int, ...]]] = {}  # by the parameters of a bucket
        self._resumed_layout: list[list[str]] = []
        model.register_comm_hook(self, DDPRun._hook)
        model._comm_hooks.pop()  # which is copied and pickled with the model; what calls the hook is not
        _RUNS[model], self._ddp = self, weakref.ref(model)

    def close(self) -> None:
        """Leave the job. DDP keeps its hook for good, which from now on raises AttachError: make a new DDP model to train on."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        super().close()

    def bucket_layout(self) -> list[list[str]]:
        return [list(names) for _, names in sorted(self._layout.items())]

    def resume_bucket_layout(self, layout: list[list[str]]) -> None:
        self._resumed_layout = layout

    # DDP checks the hook's parameter name and annotation, so this file can't postpone annotations
    def _hook(self, bucket: GradBucket) -> Future[Tensor]:
        ddp = self._ddp()
        joins = ddp is not None and ddp._join_config.enable
        checks.refuse({"ddp detached": self.is_closed, "ddp join": joins}, self.method.name, self.method.kind)
        ours = self._wrap(bucket)
        if bucket.is_last():
            self.note_backward()
            self._after_backward()
        if self._lane is None:
            future: Future[Tensor] = Future()
            self._collected.append((ours, future))
            if bucket.is_last():
                self._exchange_collected()
            return future.then(lambda f: f.value())

        def exchange() -> Tensor:
            if self._failure is not None:
                raise self._failure  # no other rank comes to this exchange
            try:
                self._exchange_buckets([ours])
            except GroupError as error:
                self._failure = error
                raise
            return ours.flat

        repeated = self.repeats([ours])
        future = self._lane.submit(exchange, [ours.flat])
        if repeated is not None:
            future.wait()  # raises here, and not in the lane, whose errors DDP turns into a RuntimeError
        return future.then(lambda f: f.value())

    def _wrap(self, bucket: GradBucket) -> Bucket:
        ids = tuple(map(id, bucket.parameters()))
        if ids not in self._cuts:
            starts = itertools.accumulate((view.numel() for view in bucket.gradients()[:-1]), initial=0)
            self._cuts[ids] = tuple(self._name_of[one] for one in ids), tuple(starts)
        names, places = self._cuts[ids]
        if bucket.index() == 0:
            self._layout.clear()
        self._layout[bucket.index()] = names
        return Bucket(bucket.buffer(), names, places, f"bucket {bucket.index()}")

    @torch.no_grad()
    def _exchange_buckets(self, buckets: list[Bucket]) -> None:
        """Exchange buckets; right after a resume, regrouped into those of the checkpoint, which DDP will build again."""
        for bucket in buckets if self._may_be_unused else ():
            self.save_for_rollback(bucket)
        if any(bucket.label == "bucket 0" for bucket in buckets):  # once a step, on the thread that counts everything
            for label, operation, nbytes in self._ddps_own:
                self.group.traffic.bucket = label
                sent = schedule(operation, nbytes, self.group.rank, self.group.size)
                self.group.traffic.record(operation, sent, by_rank=True)
        layout, self._resumed_layout = self._resumed_layout, []
        views = dict(view for bucket in buckets for view in bucket.views()) if layout else {}
        if not layout or sorted(views) != sorted(name for names in layout for name in names):
            self.exchange(buckets)
            return
        parts = [[(name, views[name]) for name in names] for names in layout]
        regrouped = [Bucket.of(part, f"bucket {k}") for k, part in enumerate(parts)]
        self.exchange(regrouped)
        for name, x in (view for bucket in regrouped for view in bucket.views()):
            views[name].copy_(x)

    def _exchange_collected(self) -> None:
        collected, self._collected = self._collected, []
        for thread in threads_of(carriers(self.group)):
            thread.submit(int).result()  # another model in this backward may have a lane over the same group
        try:
            self._exchange_buckets([bucket for bucket, _ in collected])
        except GradientsChanged:
            raise
        except Exception as error:
            for _, future in collected:
                future.set_exception(error)  # type: ignore[arg-type]  # typed as a result, wrongly
            return
        for bucket, future in collected:
            future.set_result(bucket.flat)

    def _after_backward(self) -> None:
        """Note versions and the time waited once DDP has put the results into the gradients."""
        begun = self._waits.now()

        def finished() -> None:
            self.waited_s += self._waits.since(begun)
            self.note_gradients()

        queue: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
        # DDP queues its own end of backward after this hook returns; a callback queued by a callback runs after that
        queue(lambda: queue(finished))


_RUNS: weakref.WeakKeyDictionary[DistributedDataParallel, DDPRun] = weakref.WeakKeyDictionary()


def _ddps_own(model: DistributedDataParallel) -> Iterator[tuple[str, str, int]]:
    """What DDP itself sends in every step: (label, operation, bytes)."""
    buffers = sum(x.nbytes for x in model.modules_buffers) if model.broadcast_buffers else 0
    if buffers:
        yield "DDP's buffers", "broadcast", buffers
    if model.find_unused_parameters and not model.static_graph:
        yield "DDP's unused parameters", "all_reduce", 4 * sum(p.requires_grad for p in model.module.parameters())


def _others_in_backward(model: DistributedDataParallel) -> Iterator[str]:
    """What communicates during backward beside the hook, on NCCL in an order of its own on each rank."""
    if model.find_unused_parameters and not model.static_graph:
        yield "find_unused_parameters=True"
    if any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.module.modules()):
        yield "SyncBatchNorm"


def wrap(model: torch.nn.Module, method: Method | type[Method] | Choice, **ddp_options: object) -> torch.nn.Module:
    """The model as `attach` needs it: in DistributedDataParallel if that can exchange for the method, else as it is.

    DDP exchanges during backward, for methods that exchange in every step, if torch.distributed is initialised. For an outer method
    it averages among the ranks of each machine, if these have several. method: as for `attach`. ddp_options: what
    DistributedDataParallel takes. Raises ConfigError for a method that cannot be made.
    """
    is_outer = resolve(chosen(method)).kind == "outer"
    if not dist.is_initialized() or (is_outer and dist.get_world_size() == 1):
        return model
    if is_outer and "COMMOPT_PEERS" not in os.environ:
        theirs: Any = ddp_options.get("process_group")
        if not (machines := checks.machines_of(theirs)):
            return model
        ddp_options["process_group"] = TorchGroup.like(theirs, machines).process_group
    return DistributedDataParallel(model, **ddp_options)  # type: ignore[arg-type]


def attach(model: DistributedDataParallel, request: checks.Request) -> Run:
    """Average the gradients of a DDP model bucket by bucket, while backward computes the next, if the method allows it.

    Unless a group is passed, it is a new process group of the model's ranks, because other calls in DDP's own would disturb it.
    Gradient accumulation: `model.no_sync()` for all but the last micro-batch, as with DDP itself.
    """
    group, theirs = request.group, model.process_group
    meeting = meeting_group(group, theirs)
    crossing = next(_others_in_backward(model), "") if device_of(theirs).type == "cuda" else ""

    def facts(method: Method) -> dict[str, object]:
        run = _RUNS.get(model)
        own = [label for label, _, _ in _ddps_own(model)] if request.overlap is not False else []
        joint = isinstance(method, EveryStep) and request.joint_decision(method)
        is_outer = method.kind == "outer"
        met = group.inside if isinstance(group, World) and is_outer else group
        ours, ranks = getattr(met, "process_group", None), dist.get_process_group_ranks
        same = isinstance(met, Group) and met.size == theirs.size() if ours is None else ranks(ours) == ranks(theirs)
        other = isinstance(met, Group) and not same and f"{type(met).__name__} of {met.size} ranks"
        return {
            "ddp around an outer method": theirs.size() > 1 and not checks.has_other_machines(group, theirs.size()),
            "ddp other ranks": other,
            "ddp detached": run is not None and run.is_closed,
            "ddp hook": run is not None or getattr(model, "_comm_hooks", None),
            "ddp python reducer": getattr(model, "_use_python_reducer", False),
            "ddp mixed precision": getattr(model, "mixed_precision", None) is not None,
            "ddp skipped buckets": getattr(model, "skip_all_reduce_unused_params", False),
            "ddp shared group": ours is theirs and own and own[0],
            "overlap with a joint decision": request.overlap and joint,
            "overlap with other collectives": request.overlap and theirs.size() > 1 and crossing,
        }

    checked = checks.check_request("ddp", model.module, request, meeting, facts)
    if not isinstance(checked.method, EveryStep):
        peers, inside = checks.connect_machines(group, dist.get_process_group_ranks(theirs))
        return OuterRun(model.module, checked, peers, Machine(inside))
    overlap = request.overlap
    if overlap is None:
        overlap = not crossing and not request.joint_decision(checked.method)
    ours = group if isinstance(group, Group) else checks.connect(theirs, checked.method)
    return DDPRun(model, checked, ours, overlap)
