"""A run that exchanges in every step: loss scales, void buckets, clipping and the optimizer's step around a method's exchange."""

import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from commopt.compress.feedback import first_bad_parameter, first_of
from commopt.errors import AttachError, GradientsChanged, GroupError
from commopt.exchange.base import is_finite
from commopt.exchange.clip import clip_by_mean_square_, clip_joint_norm_, joint_squares
from commopt.exchange.two_level import machine_mean, put_together
from commopt.groups import Group, LocalGroup, World
from commopt.method import EveryStep
from commopt.run.agree import listed
from commopt.run.checks import HALF, Checked, has_closure
from commopt.run.machine import bytes_of, give_back_memory
from commopt.run.run import Run
from commopt.run.stand_in import StandIn
from commopt.wire.bucket import Bucket, Int64Array, ParameterIndex, Share, once_per_layout
from commopt.wire.payload import Payload
from commopt.wire.shards import local

_log = logging.getLogger(__name__)
COMPARED_EVERY = 50  # exchanges: then ranks compare how many optimizer steps they have made


class EveryStepRun(Run):
    """A run of a gradient or update method, whichever framework computes the gradients."""

    method: EveryStep
    repeat_hint = "run the other backwards with gradient synchronisation off"  # instead of a second exchange
    _compares = True

    def __init__(self, model: Module, checked: Checked, group: Group) -> None:
        super().__init__(model, checked, group)
        self.max_norm, self.grad_scaler = checked.request.max_norm, checked.request.grad_scaler
        self.between = group.between if isinstance(group, World) else group
        self._voids = self._calls = self._stepped = 0
        self._sizes: list[int] = []  # elements of the buckets of the step that is under way
        self._void_names: set[str] = set()
        self._unapplied: set[str] = set()  # exchanged, but not stepped by yet
        # parameter name -> its gradient after backward, its version then, and how it began
        self._exchanged: dict[str, tuple[Tensor, int, Tensor | None] | None] = {}
        self._rollback: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._watched, self._versions = list(self.parameters.values())[-1], list[int]()  # those of backwards
        stand_in = self.optimizer if isinstance(self.optimizer, StandIn) else None
        self._is_update = stand_in is not None  # then gradients are only a copy of what it steps by
        group.traffic.method = self.method.name
        served = self.served()
        followed = {name: self.parameters[name] for name, _ in served}
        self.method.follow(self.replaced, followed)
        self.method.bind(served, self.between, share=self._share(served))
        self._attached(*(stand_in.take_place(followed) if stand_in is not None else ()))
        self._handles.append(self.optimizer.register_load_state_dict_post_hook(self._note_load))

    def served(self) -> list[tuple[str, Tensor]]:
        """The parameters that the method keeps state for, by name, in registration order."""
        return list(self.parameters.items())

    def _share(self, served: list[tuple[str, Tensor]]) -> Share | None:
        """What this rank exchanges, if its machine has others."""
        inside, machines = self.between.inside, self.between.size
        if inside is None:
            return None
        index = ParameterIndex.of(served)
        return Share.cut(index, inside.size, inside.rank, lambda numel: self.method.pieces(numel, machines))

    def finish(self) -> None:
        self._log.end_window()
        method = self.method
        if not method.is_steady and method.warmup_option and self.steps and self.ranks > 1 and self.rank == 0:
            told = "%s: its warm-up had not ended after %d steps; write a lower %s, or train for longer"
            _log.warning(told, method.name, self.steps, method.warmup_option)
        method.synchronise(self.between)  # for methods that take local steps
        super().finish()

    def _silenced(self) -> dict[str, Any]:
        alone = LocalGroup()
        group = alone if self.group.inside is None else World(self.group.inside, alone)
        return {"group": group, "between": alone, "_compares": False}

    def replicas_are_equal(self) -> bool:
        digest = hashlib.sha256()
        for _, x in self.served():
            digest.update(bytes_of(x).numpy().data)
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(self.method.device)
        self.group.traffic.bucket = "parameter hashes"
        every = self.group.all_gather(Payload.of(own))
        return all(torch.equal(own, other.tensors[0]) for other in every)

    # -- the exchange

    def exchange(self, buckets: Sequence[Bucket]) -> None:
        """Exchange buckets in place: afterwards they hold the method's mean, or NaN or zeros if the bucket is void.

        Raises GradientsChanged if all ranks repeat an exchange that no step has applied, and GroupError, on all ranks, if some do.
        """
        self._log.exchanging()
        if (repeated := self.repeats(buckets)) is not None:
            # the others may wait for this exchange: it becomes void, and ranks compare their steps
            for bucket in buckets:
                bucket.flat.fill_(math.nan)
        self._void_names.difference_update(*(bucket.names for bucket in buckets))
        method, share, inside = self.method, self.method.share, self.between.inside
        loss_scale = float(self.grad_scaler.get_scale()) if self.grad_scaler is not None else 1.0
        # a linear method keeps no state, and half precision on the wire needs the scale
        scale = 1.0 if method.is_linear else loss_scale
        is_local, is_exact = method.is_local, method.is_exact
        self._sizes += [bucket.flat.numel() for bucket in buckets]
        if not is_local and self._compares:  # nothing is sent in a local step
            self._calls += 1
            if self._calls % COMPARED_EVERY == 0:
                self._compare_steps()
        dtype = getattr(self.group, "inner_dtype", None)
        work = [self._unscaled(machine_mean(bucket, share, inside, dtype), scale) for bucket in buckets]
        self._exchange_work(work)
        every = [put_together(own, bucket, share, inside) for own, bucket in zip(work, buckets, strict=True)]
        if self.max_norm is not None and is_exact:
            good = [done for done in every if done.void is None]
            factor = loss_scale if method.is_linear else 1.0
            self._norm = clip_joint_norm_(good, self.max_norm * factor) / factor
        for bucket, done in zip(buckets, every, strict=True):
            self._exchanged.update(dict.fromkeys(bucket.names))
            if done.void is not None:
                self._record_void(bucket, done.void, is_local)
                # NaN: a GradScaler, known to us or not, finds it on every rank, skips the step and lowers its scale;
                # zeros in a local step, so that no rank skips a step that the others take
                is_zero = is_local or (self._is_update and self.grad_scaler is None)
                bucket.flat.fill_(0.0 if is_zero else math.nan)
                continue
            method.receive(done)
            method.exchanges.numpy()[self._positions(done)] += 1
            self._unapplied.update(bucket.names)
            if done is not bucket:
                bucket.flat.copy_(done.flat)
            if scale != 1.0 and not self._is_update:
                bucket.flat.mul_(scale)
        if any(done.void is not None for done in every):
            self._norm = None if self.max_norm is None else math.nan
            if not is_local:
                self._compare_steps()
        if repeated is not None:
            raise repeated

    def _exchange_work(self, work: Sequence[Bucket]) -> None:
        """Exchange unscaled buckets; if that is not exact, and there is a max_norm, local gradients are clipped first."""
        method, group, max_norm = self.method, self.between, self.max_norm
        is_local = method.is_local
        if max_norm is not None and (is_local or not method.is_exact):
            squares = joint_squares(work, group.inside)
            if is_local or method.clips_alone:
                factor = 1.0 if is_local else math.sqrt(group.size)
                self._norm = clip_joint_norm_(work, max_norm * factor, squares)
            else:
                self._norm = clip_by_mean_square_(work, max_norm, squares, group)
        if is_local:
            for bucket in work:
                method.exchange_alone(bucket, group)
        elif self.grad_scaler is None or method.is_linear or not self._void_together(work):
            self._exchange_good(work)

    def _exchange_good(self, work: Sequence[Bucket]) -> None:
        method, group = self.method, self.between
        if not method.merges_buckets:
            for bucket in work:
                group.traffic.bucket = bucket.label
                method.exchange(bucket, group)
            return
        views = dict(view for bucket in work for view in bucket.views())
        merged = Bucket.of(sorted(views.items(), key=lambda view: method.index.position[view[0]]))
        group.traffic.bucket = merged.label
        method.exchange(merged, group)
        for bucket in work:
            bucket.void = merged.void
        if merged.void is None:
            for name, x in merged.views():
                views[name].copy_(x)

    @once_per_layout
    def _positions(self, bucket: Bucket) -> Int64Array:
        """The numbers of a bucket's parameters."""
        return np.asarray([self.method.index.position[name] for name in bucket.names])

    def _void_together(self, work: Sequence[Bucket]) -> bool:
        """Make all buckets void if a GradScaler is going to skip this step: a NaN on any rank. Sends 4 bytes."""
        position = self.method.index.position
        views = [view for bucket in work for view in bucket.views()]
        are_finite = torch.stack([x.isfinite().all() for _, x in views]).tolist()
        bad = [position[name] for (name, _), is_finite in zip(views, are_finite, strict=True) if not is_finite]
        own = torch.tensor([first_of(bad)], dtype=torch.int32, device=work[0].flat.device)
        self.between.traffic.bucket = "overflow"
        first = first_bad_parameter(self.between.all_gather(Payload.of(own)))
        is_void = self.method.is_void(work[0], first, self.between)
        for bucket in work:
            bucket.void = work[0].void
        return is_void

    def repeats(self, buckets: Sequence[Bucket]) -> GradientsChanged | None:
        """What `exchange` will raise because the state still holds an earlier exchange that no step has applied."""
        if all(self._unapplied.isdisjoint(bucket.names) for bucket in buckets):
            return None
        repeated = [name for bucket in buckets for name in bucket.names if name in self._unapplied]
        if self.method.is_repeatable:
            return None
        return GradientsChanged(
            f"{repeated[0]}: {self.method.name} exchanges a second time before optimizer.step(), with the first exchange still in its "
            f"state. To accumulate gradients, or if another loss reaches these parameters, {self.repeat_hint}. To skip a "
            "step, decide before backward, or attach to the model without a wrapper, which exchanges in step(). Step run.optimizer"
        )

    def _compare_steps(self) -> None:
        if self._compares and self.group.size > 1:
            self._refuse_uneven("optimizer steps since attach", self._stepped)

    def _refuse_uneven(self, what: str, own: int) -> None:
        """Raise GroupError, on all ranks, if a count differs between them. Sends 8 bytes to each rank."""
        self.group.traffic.bucket = what
        count = torch.tensor([own], device=self.method.device)  # (1,) i64
        told = [int(one.tensors[0]) for one in self.group.all_gather(Payload.of(count))]
        if len(set(told)) > 1:
            ranks_of = {n: listed([rank for rank, one in enumerate(told) if one == n]) for n in told}
            raise GroupError(
                f"{what}: {' and '.join(f'{n} on {ranks}' for n, ranks in ranks_of.items())}; all ranks must call "
                "optimizer.step() equally often, or their parameters differ: decide on all ranks together whether to skip a step"
            )

    def note_backward(self) -> None:
        """Warn, once, if something else steps the parameters; SAM may move them before the first step, and back."""
        version = self._watched._version
        if self.steps == 0 and version not in self._versions:
            self._versions.append(version)
            if len(self._versions) == 3:
                told = "rank %d: parameters change, but not by the %s that %s is attached to: step run.optimizer"
                _log.warning(told, self.rank, type(self.replaced).__name__, self.method.name)

    def note_gradients(self) -> None:
        """Remember the gradients as backward left them, so that `step` detects a change."""
        for name in self._exchanged:
            grad = self.parameters[name].grad
            self._exchanged[name] = None if grad is None else (grad, grad._version, _beginning(grad))

    def save_for_rollback(self, bucket: Bucket) -> None:
        """Keep the state of parameters without any gradient here, in case no rank has one."""
        for name, x in bucket.views():
            if name not in self._rollback and not bool(x[:8].any()) and not bool(x.any()):
                self._rollback[name] = [(view, view.clone()) for view in self.method.state_views(name)]

    def _unscaled(self, bucket: Bucket, scale: float) -> Bucket:
        if scale == 1.0 and not (self.method.needs_float32 and bucket.flat.dtype in HALF):
            return bucket
        dtype = torch.float32 if self.method.needs_float32 else bucket.flat.dtype
        return bucket.with_flat(bucket.flat.to(dtype) / scale)

    def _record_void(self, bucket: Bucket, name: str, is_local: bool) -> None:
        self.voided.append((self.steps, name))
        where, what = f"rank {self.group.rank}", "this local step there"
        if not is_local:
            bucket.void = name
            self._void_names.update(bucket.names)
            self._voids += 1
            if self.group.rank != 0 or (self._voids & (self._voids - 1)) != 0:  # told the 1st, 2nd, 4th, 8th ... time
                return
            more = f" (the {self._voids}th time; has the training diverged?)" if self._voids > 2 else ""
            where, what = "some rank", f"this step on all ranks{more}"
        told = "step %d: %s has a NaN or an inf in its gradient on %s; %s is left out of %s"
        _log.warning(told, self.steps, name, where, bucket.label, what)

    # -- the optimizer's step

    def _note_load(self, _: torch.optim.Optimizer) -> None:
        """The optimizer has loaded a state; the method's own should follow, if it keeps any on each rank."""
        method = self.method
        is_whole = method.is_repeatable or (self._is_update and method.is_exact)  # in a warm-up the optimizer's has all
        self.lacks_state = self.ranks > 1 and not is_whole

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if has_closure(args, kwargs):
            raise AttachError(
                "optimizer.step() takes no closure here: gradients are exchanged before it; call backward, then step()"
            )
        super()._before_step(optimizer, args, kwargs)
        if self.steps == 0:  # DDP's first bucket is the whole model, and the optimizer has no state yet
            give_back_memory()
        if self.lacks_state and self.rank == 0:
            why = f"without that of {self.method.name}, whose residuals are lost; run.save and run.load keep them"
            _log.warning("the optimizer's state was loaded %s", why)
        self.lacks_state = False
        self.method.check_optimizer(self.replaced)  # a schedule or a loaded state may have set a momentum
        if self._is_update:
            self._check_gradients()
        elif not self.method.may_be_clipped:  # a GradScaler may divide them by its scale
            self._check_unchanged(1 if self.grad_scaler is not None else 0)
        for name, saved in self._rollback.items():
            grad = self.parameters[name].grad  # None, or the zeros that the user left: used on no rank
            if grad is None or not (self._is_update or bool(grad.any())):  # undo its exchange
                for view, value in saved:
                    view.copy_(value)
        if self._void_names and not self._is_update:  # clipping by a norm that is NaN has spread them
            grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            self._void_names.update(name for name, grad in grads.items() if not is_finite(grad))
        for name in self._void_names:
            self.parameters[name].grad = None

    def _check_gradients(self) -> None:
        # GradScaler.step tests the gradients for infs by multiplying them by one
        allowed = 1 if getattr(self.optimizer, "found_inf", None) is not None else 0
        if allowed and getattr(self.optimizer, "grad_scale", None) is None:
            raise GradientsChanged(
                f"GradScaler.unscale_ has no effect on {self.method.name}: leave it out, and clip by attach(..., max_norm=...)"
            )
        if allowed and self.grad_scaler is None:
            raise GradientsChanged(f"{self.method.name} has to know the scaler: attach(..., grad_scaler=scaler)")
        for name, p in self.parameters.items():
            if p.grad is None or name not in self.method.index.position:
                continue
            if name not in self._exchanged:
                raise GradientsChanged(
                    f"{name}: step() without an exchange; was the last backward under no_sync(), or not through the wrapped model, or is "
                    "there a parameter that it did not use (DistributedDataParallel(..., find_unused_parameters=True))?"
                )
        self._check_unchanged(allowed)

    def _check_unchanged(self, allowed: int) -> None:
        """Raise GradientsChanged for a gradient that has changed since backward more often than allowed."""
        for name, p in self.parameters.items():
            noted = self._exchanged.get(name)
            if noted is None or p.grad is None:
                continue
            grad, version, beginning = noted
            is_other = beginning is not None and not torch.equal(beginning, cast(Tensor, _beginning(p.grad)))
            if p.grad is not grad or grad._version > version + allowed or is_other:
                raise GradientsChanged(
                    f"{name}: the gradient was changed after backward, when it is only a copy of what {self.method.name} has exchanged; "
                    "clip by attach(..., max_norm=...), and pass a GradScaler as attach(..., grad_scaler=...)"
                )

    def _after_step(self, *_: Any) -> None:
        self.buckets, self._sizes = self._sizes, []
        self._void_names.clear()
        self._exchanged.clear()
        self._unapplied.clear()
        self._rollback.clear()
        self._stepped += self._compares
        found_inf = getattr(self.optimizer, "found_inf", None)  # a GradScaler sets it on a stand-in
        if found_inf is None or not bool(found_inf):
            self.steps += 1
        told = self.method.stepped(self.largest, self.steps, self.waited_s) if self._compares else None
        if told is not None:
            self.events.append(("choice", told))
            if self.rank == 0:
                _log.info("%s: %s", self.method.name, ", ".join(f"{key} {value}" for key, value in told.items()))

    def largest(self, own: Sequence[float]) -> list[float]:
        """The largest over all ranks of each number. Sends 8 bytes for each."""
        self.group.traffic.bucket = "measurements"
        told = self.group.all_gather(Payload.of(torch.tensor(own, dtype=torch.float64, device=self.method.device)))
        return torch.stack([one.tensors[0] for one in told]).amax(0).tolist()


def _beginning(grad: Tensor) -> Tensor | None:
    """A copy of the first elements of a DTensor, whose version does not count what clip_grad_norm_ does."""
    return local(grad).flatten()[:8].clone() if hasattr(grad, "to_local") else None
