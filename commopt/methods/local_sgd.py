"""Local SGD: every rank trains by itself, and all ranks average their parameters every N steps."""

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from commopt.errors import AttachError
from commopt.gossip.loop import Exchanged, Round
from commopt.method import options
from commopt.methods.diloco import AveragingOptions, DiLoCo, make_outer_optimizer
from commopt.optim import SAVIC
from commopt.options import Count, Names, Wanted
from commopt.wire.state import State


@options
class LocalSGDOptions(AveragingOptions):
    every: Count = 10
    average_state: Annotated[Names, Wanted("a list of names, as in [exp_avg_sq]")] = ()


class LocalSGD(DiLoCo):
    """Average the parameters every `every` steps; this is local Adam if the inner optimizer is Adam.

    Stich 2018, arXiv:1805.09767; McMahan et al. 2016, arXiv:1602.05629 (FedAvg). It equals DiLoCo with SGD of rate 1
    as its outer optimizer:
        theta_i <- mean over those present of theta_j
    Local adaptive methods differ in what happens to the inner optimizer's moments. By default each rank keeps its own.
    They can be averaged with the parameters, as in Chen et al. 2020, arXiv:2009.06675 (`average_state: [exp_avg_sq]`).
    With the optimizer `savic` they are averaged, and stay fixed between two averages as the scale that all ranks step
    by.
    Sends 8 (N-1)/N / every bytes a parameter and step, and as much for each state that is averaged.
    State: the parameters of the last average 4 (and residuals with a compressed message).
    Use it as the baseline for DiLoCo and NoLoCo, or for a few steps between averages.
    Not for many steps between averages: DiLoCo's outer momentum compensates for them.

    average_state: names of the inner optimizer's state that is averaged too, as torch calls it: exp_avg, exp_avg_sq.
    """

    name = "local_sgd"
    Options = LocalSGDOptions
    options: LocalSGDOptions
    positional: ClassVar[tuple[str, ...]] = ()

    def set_up(self) -> None:
        super().set_up()
        self.averaged_state = self.options.average_state

    def outer_optimizer(self) -> Any:
        return make_outer_optimizer("sgd", 1.0, None)

    def declare(self) -> list[State]:
        return [State("has averaged", of="run", dtype=torch.int64), *super().declare()]  # since the last step

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        super().check_optimizer(optimizer)
        has_scale = "exp_avg_sq" in self.averaged_state and self.delay == 0 and self.fragments == 1
        if isinstance(optimizer, SAVIC) and not has_scale:
            raise AttachError(
                "savic steps by the averaged scale: write average_state: [exp_avg_sq], without delay and fragments, or use adam"
            )

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        self.state["has averaged"].fill_(int("delta" in exchanged.values))
        return super().apply(x, round, exchanged)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if bool(self.state["has averaged"]) and isinstance(optimizer, SAVIC):
            optimizer.take_scale()
        self.state["has averaged"].zero_()

    def bytes_per_parameter(self, ranks: int) -> float:
        return super().bytes_per_parameter(ranks) * (1 + len(self.averaged_state))
