"""Local SGD: every rank trains by itself, and now and then all take the mean of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from commopt.errors import check_option
from commopt.methods.diloco import DiLoCo


class LocalSGD(DiLoCo):
    """Average the parameters every `every` steps; local Adam where the inner optimizer is Adam.

    Stich 2018, arXiv:1805.09767; McMahan et al. 2016, arXiv:1602.05629 (FedAvg). As DiLoCo with SGD of rate 1 as its outer optimizer:
        theta_i <- mean over those present of theta_j
    The variants of local adaptive methods differ in what becomes of the inner optimizer's moments: kept by each rank (the default),
    or averaged with the parameters, as in Chen et al. 2020, arXiv:2009.06675: `average_state: [exp_avg_sq]` for one scale for all.
    Sends 8 (N-1)/N / every bytes a parameter and step, and as much for each state that is averaged.
    State: the parameters of the last average 4 (and residuals with a compressed message).
    Use it as the baseline that DiLoCo and NoLoCo are judged by, or for a few steps between averages.
    Not for many steps between averages: DiLoCo's outer momentum makes up for them.

    average_state: names of the inner optimizer's state that is averaged too, as torch calls it: exp_avg, exp_avg_sq.
    """

    name = "local_sgd"
    positional: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        every: int = 10,
        average_state: Sequence[str] = (),
        fragments: int = 1,
        participation: float = 1.0,
        delay: int = 0,
        timeout_s: float = 20.0,
        message: Any = None,
        final_average: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            every=every,
            outer="sgd",
            lr=1.0,
            fragments=fragments,
            participation=participation,
            delay=delay,
            timeout_s=timeout_s,
            message=message,
            final_average=final_average,
            seed=seed,
        )
        wanted = "a list of names, as in [exp_avg_sq]"
        check_option(
            "average_state",
            average_state,
            lambda x: not isinstance(x, str) and all(isinstance(key, str) and key for key in x),
            wanted,
        )
        self.averaged_state = tuple(average_state)

    def bytes_per_parameter(self, ranks: int) -> float:
        return super().bytes_per_parameter(ranks) * (1 + len(self.averaged_state))
