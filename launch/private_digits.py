"""Train on scikit-learn's digits so that nobody can tell from the model whether a digit was among them; prints the epsilon spent.

python launch/private_digits.py --epsilon 8
torchrun --nproc-per-node=4 launch/private_digits.py --epsilon 8 --error-norm 0

Needs scikit-learn, and dp-accounting: pip install scikit-learn 'dp-accounting<1'. With --error-norm 0 it is DP-SGD without subsampling.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import commopt
from commopt.methods.dice_sgd import DiceSGD, noise_multiplier_for


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 64) in [0, 1], and their digits (n,); 297 are held out."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    return x[297:], y[297:], x[:297], y[:297]


def main(args: argparse.Namespace) -> None:
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y, test_x, test_y = read_digits()
    x, y = x[rank::world], y[rank::world]  # each rank's own digits
    batch = args.batch // world

    torch.manual_seed(args.seed)  # the same model on every rank
    model = nn.Linear(64, 10)
    method = DiceSGD(
        clip_norm=args.clip_norm,
        error_norm=args.error_norm,
        noise_multiplier=noise_multiplier_for(args.epsilon, args.delta, args.steps),
        samples_per_rank=batch,
    )
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    run = commopt.attach(model, method, sgd)

    # which samples are drawn does not depend on their content
    samples = torch.Generator().manual_seed(1000 * args.seed + rank)
    for _ in range(args.steps):
        which = torch.randperm(len(x), generator=samples)[:batch]
        method.backward(model, F.cross_entropy, x[which], y[which])  # instead of loss.backward()
        sgd.step()

    releases = int(method.state["releases"])
    right = (model(test_x).argmax(1) == test_y).double().mean()
    if rank == 0:
        print(f"held-out digits: {right:.1%} right")
        print(f"epsilon {method.epsilon(args.delta):.3g} at delta {args.delta:g}, after {releases} steps")
        print("one digit replaced by any other changes what can be learnt from the model by no more than that")
    run.quiet()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0, help="what all steps together may spend")
    parser.add_argument("--delta", type=float, default=1e-5, help="well below one over the number of samples")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1500, help="samples of a step, over all ranks")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="largest gradient of one sample")
    parser.add_argument("--error-norm", type=float, default=0.25, help="largest error sent; 0 is DP-SGD")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    main(parser.parse_args())
