"""0/1 Adam: the variance is updated less and less often, and then the momentum is exchanged less and less often."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from commopt.errors import GroupError
from commopt.exchange.two_level import own_share, put_together
from commopt.groups.base import Group
from commopt.kernels.reference.apply import Move
from commopt.method import options
from commopt.optim.frozen import FrozenOptions, FrozenVariance
from commopt.options import Count, Flag, Wanted
from commopt.wire.bucket import Bucket
from commopt.wire.state import Saved, State, load_mean

LocalStepScaler = Annotated[Count | Literal["rate"], Wanted("a whole number from 1, or 'rate'")]
VarFreezeStep = Annotated[Count | Literal["auto"] | None, Wanted("a whole number from 1, 'auto', or None for never")]


@options
class ZeroOneAdamOptions(FrozenOptions):
    var_freeze_step: VarFreezeStep = "auto"
    var_update_scaler: Count = 16
    local_step_scaler: LocalStepScaler = "rate"
    local_step_clipper: Count = 16
    bias_correction: Flag = True


class ZeroOneAdam(FrozenVariance):
    """Adam that sends signs from early on: of gradients between rare exact ones, and then of the momentum of local steps.

    Lu et al. 2022, arXiv:2202.06009, Algorithm 1, as in its released code. Phase A, steps t = 1 to var_freeze_step,
    with g_i the local gradient and C scaled signs with error feedback on both sides:
        t divides by k: g = mean g_i;  v <- b2 v + (1 - b2) g^2;  k doubles after every var_update_scaler of these
        else:           g = C(mean C(g_i))
        m <- b1 m + (1 - b1) g;  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
    Then v stays and the residuals restart at zero. Phase B, with H = 1, doubled each time the rate has halved, up to
    local_step_clipper:
        m_i <- b1 m_i + (1 - b1) g_i;  x_i <- x_i - lr (m_i / (sqrt(v) + eps) + weight_decay x_i);  R <- R + lr
        u_i <- u_i + lr (m_i - u_i) / R, the mean of m_i since the last exchange, each as long as it was stepped along
        t divides by H: m = C(mean C(u_i));  x = x' - R m / (sqrt(v) + eps), decayed like x_i;  x' <- x;  R <- 0
    Replicas are equal, bit for bit, after each exchange, and differ between exchanges (`is_synchronised`).
    `synchronise(group)` exchanges at once. Call it before an evaluation, at the end, and before a checkpoint whose
    model is used alone. Differs from the code: the mean momentum u is exchanged and not R u, so that the residuals
    keep their unit and no rate divides, not even 0. Weight decay stays out of u. The common point x' is kept and not
    computed back. Coordinates without variance are masked in both phases. Bias correction is on by default, as in
    torch.optim.Adam, with v's own count of updates. A NaN at an exchange leaves the bucket out on all ranks. Its
    parameters continue with local steps until the next exchange. Only its own rank detects a NaN in a local step, and
    steps along its old momentum. One rank alone takes no local steps.
    Sends 2(N-1)/N x (1/8 + 4/block_size) / local_step_clipper bytes per parameter and step at the end of phase B.
    State: m, v, u, x', 4 bytes per parameter of worker residual and 4/N of server residual.
    Use it for long trainings on slow networks, also if latency is high: most steps of phase B send nothing.
    Not for short trainings (its schedules are made for 100,000 steps), or if replicas must be equal after every step.
    Coordinates that hardly ever get a gradient have a tiny v. Signs move them far, and local steps farther; a larger
    eps, such as 1e-5, prevents this.

    var_freeze_step: the last step of phase A; or "auto": when |v|_1 has changed by less than 4 % over 1/(1 - b2)
        steps, and the rate no longer rises, or after a quarter of a run as in `onebit_adam`; or None: phase A only.
    var_update_scaler: exact gradients until the steps between them double; in a run of hundreds of steps at least
        var_freeze_step, so that all are exact until then.
    local_step_scaler: "rate": the interval of exchanges is the highest learning rate so far over the current one, as a
        power of 2; or the steps until it doubles, in the released code 32,678, in which the paper's rate halves.
    local_step_clipper: the longest interval; with local_step_scaler: 1 it is the constant one, except for the first
        steps.
    scale, block_size, residual_bits: as in `ef_sign`; "rms" by default.
    prescale, max_ratio, momentum_mask: as in `onebit_adam`. max_ratio, which the paper does not have, holds from the
        first compressed gradient on.
    """

    name = "zero_one_adam"
    Options = ZeroOneAdamOptions
    options: ZeroOneAdamOptions
    warmup_option = "var_freeze_step"
    stands_for = ("Adam", "AdamW")
    states: ClassVar[tuple[State, ...]] = (
        *FrozenVariance.states,
        State("mean_momentum"),
        State("common"),
        State("local_steps", of="parameter", dtype=torch.int64),
        State("rate", of="parameter", dtype=torch.float64),  # R since x'
        State("kept", of="parameter", dtype=torch.float64, initial=1.0),  # the factor of decay since x'
        State("variance_updates", of="run", dtype=torch.int64),
        State("frozen_at", of="run", dtype=torch.int64),
        State("highest_lr", of="run", dtype=torch.float64),
    )

    def set_up(self) -> None:
        super().set_up()
        if self.freeze_at is None:
            self.warmup_steps = self.options.var_update_scaler

    @property
    def variance_interval(self) -> int:
        """In phase A the steps from one exact gradient to the next."""
        return int(2 ** (int(self.state["variance_updates"]) // self.options.var_update_scaler))

    @property
    def local_interval(self) -> int:
        """In phase B the steps from one exchange to the next."""
        if self.options.local_step_scaler == "rate":
            rate = float(self.state["last_lr"])  # of the step before, so that it is one value from exchange to update
            doublings = math.log2(float(self.state["highest_lr"]) / rate) + 1e-9 if rate > 0 else math.inf
        else:
            doublings = (self.applied_steps - int(self.state["frozen_at"])) / float(self.options.local_step_scaler)
        return min(self.options.local_step_clipper, 1 << int(min(doublings, 62)))

    @property
    def is_exact(self) -> bool:
        return not self.is_frozen and (self.applied_steps + 1) % self.variance_interval == 0

    @property
    def is_local(self) -> bool:
        return self.is_frozen and self.ranks > 1 and (self.applied_steps + 1) % self.local_interval != 0

    @property
    def is_synchronised(self) -> bool:
        return not bool(self.state["local_steps"].any())

    @property
    def has_signs(self) -> bool:
        return self.ranks > 1 and (self.is_frozen or self.variance_interval > 1)

    @property
    def is_steady(self) -> bool:
        """Whether local steps have begun; in phase A, which never ends without a freeze, whether most steps send signs."""
        return self.variance_interval > 1 if self.options.var_freeze_step is None else self.is_frozen

    def accumulates(self, bucket: Bucket) -> list[tuple[str, Callable[[str], float]]]:
        step, rate = self.numbers("step", bucket.names), self.numbers("rate", bucket.names)

        def weight(name: str) -> float:
            return self._step(rate[name], self.settings(name), step[name] + 1)[2]

        return [*super().accumulates(bucket), ("mean_momentum", weight)]  # m_i, then u_i

    def _step(self, since: float, group: Mapping[str, Any], step: int) -> tuple[float, float, float]:
        """The rate of a step, the factor that decay leaves of x, and the step's weight in the mean momentum since x'.

        since: R, the sum of rates since x'.
        """
        rate = float(group["lr"])
        kept = 1 - rate * float(group["weight_decay"])
        if self.options.bias_correction:
            rate /= 1 - group["betas"][0] ** step
        total = since * kept + rate
        return rate, kept, rate / total if total > 0 else 1.0

    def update(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        is_local, moves, since = self.is_local, dict[str, Move](), dict[str, tuple[float, float]]()
        columns = [self.numbers(key, names) for key in ("step", "variance_step", "rate", "kept")]
        for name in names:
            step, variance_step, rate_before, kept_before = (column[name] for column in columns)
            rate, kept, weight = self._step(rate_before, group, step)
            since[name] = (rate_before * kept + rate, kept_before * kept)
            own = (rate, kept, weight) if is_local else since[name]
            moves[name] = Move(self.root_of(variance_step, group), *own)
        of_state = self.numbers("local_steps", names)
        apart, together = ([name for name in names if bool(of_state[name]) == own] for own in (True, False))
        if is_local:
            if together:
                held = [self.held(name) for name in together]
                common = [self.part("common", name).view_as(x) for name, x in zip(together, held, strict=True)]
                torch._foreach_copy_(common, held)  # x' <- x
            self.move_(moves, mean=self.state["mean_momentum"])  # u_i <- u_i + lr (m_i - u_i) / R, and x_i
            self.state["local_steps"][self._positions(names)] += 1
            self.set_numbers("rate", {name: rate for name, (rate, _) in since.items()})
            self.set_numbers("kept", {name: kept for name, (_, kept) in since.items()})
        else:
            self.move_({name: moves[name] for name in apart}, start=self.state["common"])
            self.move_({name: moves[name] for name in together})
            if apart:  # u is of each rank's own steps: from here on all ranks have the same state
                torch._foreach_zero_(self.parts_of("mean_momentum", apart))
                self._meet(apart)

    def _meet(self, names: Sequence[str]) -> None:
        """Note that these parameters are the same on all ranks again."""
        for key, value in (("local_steps", 0), ("rate", 0.0), ("kept", 1.0)):
            self.set_numbers(key, dict.fromkeys(names, value))

    @torch.no_grad()
    def synchronise(self, group: Group) -> None:
        apart = [name for name in self.parameters if self.state["local_steps"][self.index.position[name]]]
        if not apart:
            return
        bucket = Bucket.of([(name, self.part("mean_momentum", name)) for name in apart], "local steps")
        group.traffic.bucket = bucket.label
        own = own_share(bucket, self.share)
        self.two_way.blended, self.two_way.also, self.two_way.mask = (), None, None
        self.two_way.exchange(own, group)
        bucket = put_together(own, bucket, self.share, group.inside)
        if bucket.void is not None:
            raise GroupError(f"{bucket.void}: the momentum of its local steps has overflowed; replicas stay different")
        self.mask_(bucket)
        torch._foreach_copy_(self.parts_of("momentum", apart), [x for _, x in bucket.views()])
        variance_step, rate, kept = (self.numbers(key, apart) for key in ("variance_step", "rate", "kept"))
        roots = {name: self.root_of(variance_step[name], self.settings(name)) for name in apart}
        self.move_({name: Move(roots[name], rate[name], kept[name]) for name in apart}, start=self.state["common"])
        self._meet(apart)
        self.exchanges[self._positions(apart)] += 1

    def after_step(self) -> None:
        if not self.is_frozen and self.applied_steps % self.variance_interval == 0:
            self.state["variance_updates"] += 1
            self._make_mask()
        super().after_step()
        self.state["highest_lr"].clamp_(min=float(self.state["last_lr"]))

    def freeze(self) -> None:
        super().freeze()
        self.state["frozen_at"].fill_(self.applied_steps)
        self.two_way.worker.residual.zero_()  # of gradients; what follows is momentum
        self.two_way.server.residual.zero_()

    def go_on_from(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        super().go_on_from(entries)
        steps = self.applied_steps
        while steps >= self.variance_interval:  # as far as the schedule is after as many steps
            steps -= self.variance_interval
            self.state["variance_updates"] += 1

    def restored(self) -> None:
        self.mask = None
        if bool(self.state["variance_updates"]):
            self._make_mask()

    def variance_correction(self, group: Mapping[str, Any]) -> float:
        updates = int(self.state["variance_updates"])
        return 1 - float(group["betas"][1]) ** updates if self.options.bias_correction else 1.0

    def bytes_per_parameter(self, ranks: int) -> float:
        each = self.two_way.bytes_per_parameter(ranks)
        return each if self.options.var_freeze_step is None else each / self.options.local_step_clipper

    def saved(self) -> Saved:
        saved = super().saved()
        if not self.is_synchronised:  # between two exchanges each rank has parameters and momenta of its own
            saved["rank"] |= {f"own {key}": x for key, x in self._own().items()}
        return saved

    def load(self, saved: Saved) -> None:
        super().load(saved)
        self._load_own([saved])

    def resize(self, every: Sequence[Saved]) -> None:
        """As the parents do; between two exchanges every new rank starts from the mean of the old ranks' local steps."""
        super().resize(every)
        self._load_own(every)

    def _own(self) -> dict[str, Tensor]:
        """What differs between ranks between two exchanges, in float32."""
        parameters = torch.cat([self.held(name).reshape(-1).float() for name in self.parameters])
        return {"parameters": parameters, **{key: self.state[key] for key in ("momentum", "mean_momentum")}}

    @torch.no_grad()
    def _load_own(self, every: Sequence[Saved]) -> None:
        """Take the mean of what some ranks had of their own; nothing if it was not saved between two exchanges."""
        if "own parameters" not in every[0]["rank"]:
            return
        for key, x in self._own().items():
            mean = x.double()
            load_mean(mean, [saved["rank"] for saved in every], f"own {key}")
            x.copy_(mean)
            if key == "parameters":
                for name in self.parameters:
                    p = self.held(name)
                    p.copy_(self.index.view(x, name).view(p.shape))
