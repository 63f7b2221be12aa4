"""The configurations of DeepSpeed's tutorials for its old optimizers, with batches and steps shrunk, load and train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


class Bert(nn.Module):
    """The tutorials' models in small: sums over a vocabulary, and more than one kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.layer(self.words(x))).flatten(0, 1).float(), x.flatten())


TUTORIALS = sorted(path.name for path in CONFIGS.glob("*.json") if path.name.startswith(("bert", "squad")))


@pytest.mark.parametrize("name", TUTORIALS)
@pytest.mark.ranks("deepspeed", 2)
def test_configurations_of_the_old_tutorials_load_and_train(name: str) -> None:
    from commopt.deepspeed import initialize

    assert len(TUTORIALS) == 4
    torch.manual_seed(1)
    model = Bert()
    decays = [p for p in model.parameters() if p.dim() > 1]
    rest = [{"params": decays, "weight_decay": 0.01}, {"params": [p for p in model.parameters() if p.dim() < 2]}]
    engine, optimizer, _, _ = initialize(model=model, model_parameters=rest, config=str(CONFIGS / name))
    assert optimizer is engine.optimizer
    losses = []
    for step in range(60):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        loss = engine(torch.randint(50, (2, 8), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    steps = engine.commopt.method.applied_steps
    engine.commopt.finish()
    assert sum(losses[-8:]) < sum(losses[:8])
    assert engine.commopt.replicas_are_equal()
    accumulation = json.loads((CONFIGS / name).read_text())["train_batch_size"] // (3 if "squad" in name else 2) // 2
    assert 60 // accumulation - 20 < steps <= 60 // accumulation  # at a scale of 2^16 the first ones overflow
