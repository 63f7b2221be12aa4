"""The uncompressed baseline."""

from commopt.exchange.mean import Mean
from commopt.method import GradientMethod


class Dense(GradientMethod, Mean):
    """Average gradients in their own dtype by a ring all-reduce: what DDP does, counted and paced like every other method.

    PyTorch's DistributedDataParallel, Li et al. 2020, arXiv:2006.15704; the ring: Patarasuk and Yuan 2009.
        y = mean g_i
    Sends 2(N-1)/N x 4 bytes per float32 parameter and step.
    State: none.
    Use it as the baseline, and whenever a step does not wait for the link.
    Not for links on which sending gradients takes longer than the arithmetic.
    """

    name = "dense"
    is_exact = True
