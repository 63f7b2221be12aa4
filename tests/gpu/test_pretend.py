"""The pretended device refuses what a GPU refuses; otherwise tests on it would prove nothing."""

from __future__ import annotations

import pytest
import torch
from pretend import DEVICE, working_on


def test_mixing_devices_and_reading_memory_directly_fail_as_on_a_gpu() -> None:
    with working_on(DEVICE):
        x = torch.arange(3.0).to(DEVICE)
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            x + torch.ones(3)
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        assert (x + torch.tensor(1.0)).cpu().tolist() == [1.0, 2.0, 3.0]


def test_views_share_memory_and_gradients_flow() -> None:
    with working_on(DEVICE):
        x = torch.ones(4, device=DEVICE, requires_grad=True)
        torch.autograd.backward((x.view(2, 2) * torch.tensor([1.0, 2.0], device=DEVICE)).sum())
        assert x.grad is not None
        x.grad.view(2, 2)[0].zero_()
        assert (x.grad.device, x.grad.tolist()) == (DEVICE, [0.0, 0.0, 1.0, 2.0])
