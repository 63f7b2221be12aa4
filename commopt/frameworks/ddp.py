"""A method as the communication hook of DistributedDataParallel."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist  # initialises the module below
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice
from commopt.errors import AttachError
from commopt.exchange.mean import Aggregator
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group
from commopt.plan.links import schedule
from commopt.run.agree import Configuration, agree, check_group, configuration_of, meeting_group, own_group
from commopt.run.base import Attachment, check_optimizer, check_parameters, check_wrapping, connect
from commopt.run.door import made
from commopt.run.lane import Lane
from commopt.wire.bucket import Bucket

_DETACHED = (
    "a method was detached from this DDP model, which keeps its hook for good: make a new DistributedDataParallel(model.module), and "
    "attach to that"
)


class DDPAttachment(Attachment):
    """Averages bucket by bucket while backward goes on (overlap), or all buckets together when it reaches the last."""

    def __init__(
        self,
        model: DistributedDataParallel,
        method: Aggregator,
        optimizer: torch.optim.Optimizer | None,
        group: Group,
        overlap: bool,
    ) -> None:
        self.is_detached = False
        ddps_own = list(_ddps_own(model))
        if ddps_own and overlap and getattr(group, "process_group", None) is model.process_group:
            raise AttachError(
                f"DDP's own process group carries {ddps_own[0][0]} at the same time, in another order on each rank: "
                "leave the group out, or give attach one over a new process group"
            )
        super().__init__(model.module, method, optimizer, group)
        self._name_of = {id(p): name for name, p in self.parameters.items()}
        self._lane = Lane(next(iter(self.parameters.values())).device) if overlap else None
        self._collected: list[tuple[Bucket, Future[torch.Tensor]]] = []
        self._may_be_unused = bool(model.find_unused_parameters or model.static_graph)
        self._last_hook_s = 0.0
        self._ddps_own = ddps_own
        self._layout: dict[int, tuple[str, ...]] = {}
        self._resumed_layout: list[list[str]] = []
        model.register_comm_hook(self, DDPAttachment._hook)

    def detach(self) -> None:
        """Stop the lane. DDP keeps its hook for good, which from now on raises AttachError: make a new DDP model to train on."""
        self.is_detached = True
        if self._lane is not None:
            self._lane.close()
        super().detach()

    def bucket_layout(self) -> list[list[str]]:
        return [list(names) for _, names in sorted(self._layout.items())]

    def resume_bucket_layout(self, layout: list[list[str]]) -> None:
        self._resumed_layout = layout

    # DDP checks the parameter's name and annotation, which is why this file does without postponed annotations
    def _hook(self, bucket: GradBucket) -> Future[torch.Tensor]:
        if self.is_detached:
            raise AttachError(_DETACHED)
        ours = self._wrap(bucket)
        if bucket.is_last():
            self._after_backward()
        if self._lane is None:
            future: Future[torch.Tensor] = Future()
            self._collected.append((ours, future))
            if bucket.is_last():
                self._exchange_collected()
            return future.then(lambda f: f.value())
        return self._lane.submit(lambda: self._exchange_one(ours)).then(lambda f: f.value())

    def _count_ddps_own(self) -> None:
        """Count what DDP itself sends in this step: rank 0's buffers, and which parameters were used."""
        traffic = self.group.traffic
        for label, operation, nbytes in self._ddps_own:
            traffic.bucket = label
            traffic.record(operation, schedule(operation, nbytes, self.group.rank, self.group.size))

    def _wrap(self, bucket: GradBucket) -> Bucket:
        flat, views = bucket.buffer(), bucket.gradients()
        names = tuple(self._name_of[id(p)] for p in bucket.parameters())
        starts = tuple(int(view.storage_offset()) - int(flat.storage_offset()) for view in views)
        if bucket.index() == 0:
            self._layout.clear()
        self._layout[bucket.index()] = names
        return Bucket(flat, names, starts, f"bucket {bucket.index()}")

    def _exchange(self, buckets: list[Bucket]) -> None:
        """Run buckets; DDP's first ones after a resume as those that it had made before, and will make again."""
        if any(bucket.label == "bucket 0" for bucket in buckets):  # once a step, on the thread that counts everything
            self._count_ddps_own()
        layout, self._resumed_layout = self._resumed_layout, []
        views = dict(view for bucket in buckets for view in bucket.views())
        if not layout or sorted(views) != sorted(name for names in layout for name in names):
            self.run(buckets)
            return
        regrouped = [
            Bucket.of([(name, views[name]) for name in names], f"bucket {k}") for k, names in enumerate(layout)
        ]
        self.run(regrouped)
        for name, x in (view for bucket in regrouped for view in bucket.views()):
            views[name].copy_(x)

    def _exchange_one(self, bucket: Bucket) -> torch.Tensor:
        with torch.no_grad():
            if self._may_be_unused:
                self.save_for_rollback(bucket)
            self._exchange([bucket])
        return bucket.flat

    def _exchange_collected(self) -> None:
        collected, self._collected = self._collected, []
        try:
            with torch.no_grad():
                for bucket, _ in collected:
                    if self._may_be_unused:
                        self.save_for_rollback(bucket)
                self._exchange([bucket for bucket, _ in collected])
        except Exception as error:
            for _, future in collected:
                future.set_exception(error)  # type: ignore[arg-type]  # typed as a result, wrongly
            return
        for bucket, future in collected:
            future.set_result(bucket.flat)

    def _after_backward(self) -> None:
        """Note versions and the time waited once DDP has put the results into the gradients.

        DDP queues its own end of backward after this hook returns; a callback queued by a callback runs after that.
        """
        self._last_hook_s = time.perf_counter()

        def finished() -> None:
            self.waited_s += time.perf_counter() - self._last_hook_s
            self.note_versions()

        queue: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(finished))


def _ddps_own(model: DistributedDataParallel) -> Iterator[tuple[str, str, int]]:
    """What DDP itself sends in every step: (label, operation, bytes)."""
    buffers = sum(x.nbytes for x in model.modules_buffers) if model.broadcast_buffers else 0
    if buffers:
        yield "DDP's buffers", "broadcast", buffers
    if model.find_unused_parameters and not model.static_graph:
        yield "DDP's unused parameters", "all_reduce", 4 * sum(p.requires_grad for p in model.module.parameters())


def _check_same_ranks(model: DistributedDataParallel, group: Group | None) -> None:
    """Raise AttachError for a group of other ranks than DDP's own, between which replicas would differ."""
    own, ours = model.process_group, getattr(group, "process_group", None)
    same = group is None or group.size == own.size()
    if ours is not None:
        same = dist.get_process_group_ranks(ours) == dist.get_process_group_ranks(own)
    if not same and group is not None:
        raise AttachError(
            f"group: has {group.size} ranks, and DDP's own {own.size()}, or others: it must be the same ones; leave it out"
        )


def attach(
    model: DistributedDataParallel,
    method: Aggregator | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | None = None,
    *,
    overlap: bool = True,
) -> DDPAttachment:
    """Average the gradients of a DDP model by any method.

    method: what `commopt.build` made, or takes. `optimizer` is the one that applies a gradient method's result; an update
    method is its own. `group` is a new process
    group of the model's ranks unless given, because DDP's own must not see calls in between. `overlap` exchanges each
    bucket while backward computes the next; False waits for all of them, which `max_norm` needs.

    Gradient accumulation: `model.no_sync()` for all but the last micro-batch, as with DDP itself.
    Raises AttachError if method, model and optimizer do not fit together, or ranks disagree, on every rank and before anything is changed.
    """
    is_ddp = isinstance(model, DistributedDataParallel)
    meeting = meeting_group(group, own_group(model))

    def check() -> tuple[tuple[Aggregator, torch.optim.Optimizer], Configuration]:
        if not is_ddp:
            inside = getattr(model, "_orig_mod", None)
            if isinstance(inside, DistributedDataParallel):
                raise AttachError(
                    "this is torch.compile around a DDP model: attach to the DDP model first, then compile it"
                )
            raise AttachError(
                f"{type(model).__name__} is no DistributedDataParallel: wrap the model first, or use integrations.plain"
            )
        chosen = made(method, model.module, optimizer)
        if isinstance(chosen, OuterLoop):
            raise AttachError(
                f"{chosen.name} averages parameters now and then, and DDP gradients in every step: leave DDP out, and use "
                "integrations.plain"
            )
        check_group(group)
        _check_same_ranks(model, group)
        if getattr(model, "_comm_hooks", None):
            if any(isinstance(state, DDPAttachment) and state.is_detached for _, state in model._comm_hooks):
                raise AttachError(_DETACHED)
            raise AttachError(
                "this DDP model has a communication hook already, and DDP takes only one; attach before registering others"
            )
        check_wrapping(model.module)
        stepping = check_optimizer(chosen, optimizer)
        named = check_parameters(model.module, chosen, stepping)
        if chosen.needs_all_buckets and overlap:
            what = "max_norm" if chosen.max_norm is not None else f"{chosen.name} with one scale for the whole model"
            raise AttachError(f"{what} needs the gradients of all buckets at once: attach(..., overlap=False)")
        if getattr(model, "mixed_precision", None) is not None:
            raise AttachError("DDP's own mixed_precision casts gradients around the hook; use torch.autocast instead")
        return (chosen, stepping), configuration_of("ddp", chosen, named, stepping, model=model.module, overlap=overlap)

    chosen, stepping = agree(meeting, check)
    return DDPAttachment(model, chosen, stepping, group or connect(model.process_group), overlap)
