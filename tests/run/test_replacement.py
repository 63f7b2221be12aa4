"""What an update method may take the place of, and what is said where it may not."""

from __future__ import annotations

import pytest
import torch
from rig import make_model

from commopt import build
from commopt.errors import AttachError, ConfigError
from commopt.run.stand_in import refuse_steps, stand_in


def test_an_optimizer_of_another_kind_is_told_first() -> None:
    model = make_model()
    adagrad = torch.optim.Adagrad(model.parameters())
    assert adagrad.state  # before any step
    with pytest.raises(ConfigError, match="can stand in for Adam or AdamW, not for Adagrad"):
        stand_in("onebit_adam", model, adagrad, [])


def test_an_error_speaks_of_the_framework_that_it_happens_in() -> None:
    model = make_model()
    adam = torch.optim.Adam(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(adam, float)
    with pytest.raises(AttachError, match=r"give it to initialize\(lr_scheduler=...\) too, make it after attach"):
        stand_in("onebit_adam", model, adam, [], "initialize(lr_scheduler=...)")
    refuse_steps(adam, "onebit_adam", "engine.step() steps the method")
    with pytest.raises(AttachError, match=r"the place of this Adam: engine\.step\(\) steps the method"):
        adam.step()


def test_dgc_claims_no_momentum_that_is_not_there() -> None:
    params = list(make_model().parameters())
    with pytest.raises(AttachError, match=r"not Adafactor$"):
        build("dgc").check_optimizer(torch.optim.Adafactor(params))
    with pytest.raises(AttachError, match=r"not SGD with one$"):
        build("dgc").check_optimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9))
