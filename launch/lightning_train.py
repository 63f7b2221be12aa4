"""Train launch/train.py's GPT as a LightningModule, by any method; an example to copy.

python launch/lightning_train.py --method onebit_adam --options '{"freeze_step": 8}'
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from train import GPT, draw, read_corpus

from commopt.frameworks.lightning import CommoptStrategy
from commopt.optim import OPTIMIZERS


class Windows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Windows of the text by number, always the same; Lightning gives each rank its share."""

    def __init__(self, data: Tensor, context: int, size: int) -> None:
        self.data, self.context, self.size = data, context, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        x, y = draw(self.data, 1, self.context, torch.Generator().manual_seed(k))
        return x[0], y[0]


class Language(pl.LightningModule):
    """An ordinary LightningModule: nothing in it depends on the method."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.gpt, self.args = GPT(args.layers, args.heads, args.width, args.context), args

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = OPTIMIZERS[self.args.optimizer](self.parameters(), lr=self.args.lr)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.args.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss: Tensor = self.gpt(*batch)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", self.gpt(*batch), sync_dist=True)


class Printed(pl.Callback):
    """Prints every fifth step's loss, and what this rank sent in that step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step, seen = trainer.global_step, trainer.callback_metrics
        if trainer.is_global_zero and (step == 1 or step % 5 == 0):
            print(f"step {step:4d}  loss {seen['loss']:.3f}  sent {seen['commopt/payload_mb']:.4f} MB", flush=True)


def main(args: argparse.Namespace) -> None:
    pl.seed_everything(args.seed, verbose=False)
    train, held_out = read_corpus(args.corpus)
    size = args.batch * args.steps * args.devices
    strategy = CommoptStrategy({"name": args.method, **args.options})
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.steps,
        callbacks=[Printed()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Language(args)
    trainer.fit(
        module,
        DataLoader(Windows(train, args.context, size), args.batch),
        DataLoader(Windows(held_out, args.context, 8 * args.devices), 8),
        ckpt_path=args.resume,
    )
    assert strategy.run is not None
    sent_mb = strategy.run.traffic.payload_bytes / 1e6
    dense_mb = 4e-6 * sum(p.numel() for p in module.parameters()) * args.steps * 2 * (args.devices - 1) / args.devices
    if trainer.is_global_zero:
        print(f"{args.method}: rank 0 sent {sent_mb:.4f} MB; DDP's float32 gradients would be {dense_mb:.4f} MB")
    if args.save is not None:
        trainer.save_checkpoint(args.save, weights_only=False)  # on all ranks: each adds what it still has to send
        if trainer.is_global_zero:
            print(
                f"saved {args.save} ({args.save.stat().st_size / 1e6:.1f} MB), with the method's state on {args.devices} ranks beside it"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="onebit_adam", help="a name from docs/methods.md")
    parser.add_argument("--options", type=json.loads, default={}, help="the method's options, as JSON")
    parser.add_argument("--optimizer", default="adam", choices=sorted(OPTIMIZERS), help="for configure_optimizers")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--corpus", type=Path, help="a file or a folder of text; default: Python's own sources")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--save", type=Path, help="write a checkpoint at the end")
    parser.add_argument("--resume", type=Path, help="resume from a checkpoint")
    sizes = {"devices": 2, "steps": 20, "batch": 4, "context": 64, "layers": 2, "heads": 4, "width": 64, "seed": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
