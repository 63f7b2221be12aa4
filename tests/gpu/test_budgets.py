"""What the exchange of a bucket may cost a GPU: ceilings that no method exceeds, and the counting that they rest on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("on the pretended device kernels run in triton's interpreter, which is off", allow_module_level=True)

import triton
import triton.language as tl
from budgets import FEW, PRESETS, SMALL, Budget, Network, count
from counting import Tally, counting
from pretend import DEVICE, working_on
from torch import Tensor

from commopt.groups import Group
from commopt.kernels.cuda import pieces
from commopt.methods import METHODS
from commopt.methods.dense import Dense
from commopt.wire.bucket import Bucket
from commopt.wire.payload import Payload

# The most that may be, in the form in which `python tests/budgets.py` prints what is. A bucket has the 12 parameters of a GPT block, in
# two sizes. same: with 32 ranks no more launches than with 4. passes: bytes read and written, over 4 for each element. syncs: how often
# the host waits. copied: bytes from the host for each element. target: what an exchange should come to with 4 ranks, with as many
# launches for any number of ranks, one synchronisation, and nothing copied.
HEAD = """
                exchange of a bucket                              optimizer's step            target
                   launches           passes     syncs  copied   launches  passes  syncs    launches
                   N = 4  N = 32    N = 4  N = 32                                           and passes"""
TABLE = """
dense                  4    same      5.0     5.0       1    0.00          0     0.0      0          -   -
fp16                   5    same      5.5     5.5       1    0.00          0     0.0      0          -   -
ef_sign               10    same      4.1     3.4       1    0.00          0     0.0      0         12   8
ef_sign l2            54    same      6.8     5.7       1    0.00          0     0.0      0         12   8
two_way int8          10    same      6.5     5.6       1    0.00          0     0.0      0         12   8
two_way 4bit          10    same      5.2     4.4       1    0.00          0     0.0      0         12   8
two_way fp8           10    same      6.5     5.6       1    0.00          0     0.0      0         12   8
loco                  10    same      4.6     3.9       1    0.00          0     0.0      0         12   8
natural               10    same      5.0     4.6       1    0.00          0     0.0      0         12   8
terngrad              12    same      6.9     6.5       1    0.00          0     0.0      0         12   8
signum                12    same      7.2     7.2       1    0.00          0     0.0      0         12   8
distributed_lion      10    same      7.3     7.4       1    0.00          1     3.0      0         12   8
onebit_adam           10    same      6.1     5.4       1    0.00          1     3.0      0         12   8
onebit_lamb           15    same     18.1    17.4       1    0.00          6     7.0      0         12   8
zero_one_adam         10    same      7.1     6.4       1    0.00          2     5.0      0         12   8
qsgd                   6    same      5.1    19.2       1    0.00          0     0.0      0         16  10
ef                     6    same      3.4     5.2       1    0.00          0     0.0      0         16  10
ef21                   8    same      8.5    10.3       1    0.00          0     0.0      0         16  10
dice_sgd              59    same     37.0    37.0       2    4.00          0     0.0      0          -   -
random_k              16    same      7.3     7.3       1    0.00          0     0.0      0         16  10
top_k                 34    same     12.0    14.7       1    0.00          0     0.0      0         40  14
threshold             36    same      7.0    11.4       1    0.00          0     0.0      0         40  14
dgc                   36    same     13.5    13.1       1    0.00          0     0.0      0         40  14
powersgd              54    same     12.2    10.6       1    0.00          0     0.0      0         60  16
demo                  10    same     11.6    11.9       1    0.00          2     4.2      0         60  16
auto                   4    same      5.0     5.0       1    0.00          0     0.0      0          -   -
"""
ROWS = {line[:16].strip(): line[16:].split() for line in TABLE.strip("\n").splitlines()}
CEILINGS = {name: Budget.read(words[:9]) for name, words in ROWS.items()}
TARGETS = {name: "{:>11}{:>4}".format(*words[9:]) for name, words in ROWS.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_costs_no_more_than_its_ceilings(name: str) -> None:
    found = Budget.measured(PRESETS[name])
    assert found.beyond(CEILINGS[name]) == [], f"{HEAD}\n{name:16}{found}\n{'at most':16}{CEILINGS[name]}"


@pytest.mark.parametrize("name", ["signum", "distributed_lion", "onebit_adam", "onebit_lamb", "zero_one_adam"])
def test_launches_do_not_grow_with_the_number_of_parameters(name: str) -> None:
    one, three = (count(PRESETS[name], SMALL, FEW, blocks=blocks) for blocks in (1, 3))
    assert three.exchange.launches <= one.exchange.launches
    assert three.step.launches <= one.step.launches


def test_the_table_has_every_method_that_exchanges_in_each_step() -> None:
    names = {name for name, method in METHODS.items() if method.kind != "outer"}
    assert {preset.name for preset in PRESETS.values()} == names
    assert list(CEILINGS) == list(PRESETS)


def test_an_exchange_by_way_of_the_host_exceeds_its_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(self: Dense, bucket: Bucket, group: Group) -> None:
        for _ in range(group.size):
            bucket.flat.copy_(bucket.flat.cpu())

    monkeypatch.setattr(Dense, "exchange", exchange)
    found = Budget.measured(PRESETS["dense"])
    assert found.beyond(CEILINGS["dense"]) == [*Budget._fields[:6]]


def test_costs_are_the_same_if_kernels_run() -> None:
    assert count(PRESETS["ef_sign"], SMALL, FEW, runs_kernels=True) == count(PRESETS["ef_sign"], SMALL, FEW)


def test_kernels_that_count_what_is_chosen_run() -> None:
    assert "_code" in count(PRESETS["threshold"], SMALL, FEW).by_name, "nothing was chosen"


@pytest.mark.parametrize(
    ("more", "columns"),
    [
        ({}, []),
        ({"launches": 5}, ["launches"]),
        ({"many": 4}, ["many"]),
        ({"passes": 5.1, "syncs": 2}, ["passes", "syncs"]),
        ({"copied": 0.01, "step_launches": 1}, ["copied", "step_launches"]),
    ],
)
def test_what_exceeds_a_ceiling_is_named(more: dict[str, Any], columns: list[str]) -> None:
    ceiling = Budget(4, None, 5.0, 5.0, 1, 0.0, 0, 0.0, 0)
    assert ceiling._replace(**more).beyond(ceiling) == columns
    assert ceiling.beyond(ceiling._replace(many=6)) == []


def counted(work: Callable[[Tensor, Tensor, Tensor], Any], **how: bool) -> Tally:
    """Count some work on two tensors of 6 float32 and one of 2 int64."""
    with working_on(DEVICE):
        x, y, numbers = torch.arange(6.0).to(DEVICE), torch.ones(6).to(DEVICE), torch.tensor([1, 4]).to(DEVICE)
        with counting(**how) as tally:
            work(x, y, numbers)
    return tally


BYTES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "sum": (lambda x, y, _: x + y, 24 + 24 + 24),
    "in place": (lambda x, y, _: x.add_(y), 24 + 24 + 24),
    "in place of another": (lambda x, y, _: torch.lerp(x, y, 0.5, out=y), 24 + 24 + 24),
    "overwritten": (lambda x, y, _: x.copy_(y), 24 + 24),
    "filled": (lambda x, *_: x.zero_(), 24),
    "filled in part": (lambda x, *_: x.__setitem__(slice(2), 0.0), 4 + 8),
    "made": (lambda *_: torch.zeros(6, device=DEVICE), 24),
    "narrowed": (lambda x, *_: x.to(torch.bfloat16), 24 + 12),
    "a part": (lambda x, *_: x[:2].sum(), 8 + 4),
    "expanded": (lambda x, y, _: x[:1].expand(6) + y, 4 + 24 + 24),
    "joined": (lambda x, y, _: torch.cat([x, y]), 24 + 24 + 48),
    "many overwritten": (lambda x, y, _: torch._foreach_copy_([x, x], [y, y]), 2 * 24 + 2 * 24),
    "many at once": (lambda x, y, _: torch._foreach_add_([x, y], [y, y]), 4 * 24 + 2 * 24),
    "gathered": (lambda x, _, numbers: x[numbers], 16 + 8 + 8),
    "scattered": (lambda x, y, numbers: x.index_add_(0, numbers, y[:2]), 16 + 8 + 8 + 8),
}


@pytest.mark.parametrize("name", BYTES)
def test_an_operation_is_a_launch_that_reads_its_inputs_and_writes_its_outputs(name: str) -> None:
    work, moved = BYTES[name]
    tally = counted(work)
    assert (tally.launches, tally.moved, tally.syncs, tally.copied) == (1, moved, 0, 0)


def test_views_new_memory_and_work_on_the_cpu_cost_nothing() -> None:
    def work(x: Tensor, *_: Tensor) -> None:
        x.view(2, 3).t()[0].expand(5, 2).detach()
        torch.split(x, [2, 4])
        torch.empty(6, device=DEVICE)
        torch.ones(6).add_(1).tolist()

    assert counted(work).costs(6) == (0, 0.0, 0, 0.0)


SYNCS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "item": (lambda x, *_: x[0].item(), 1),
    "float": (lambda x, *_: float(x[0]), 1),
    "int": (lambda x, *_: int(x[0]), 1),
    "bool": (lambda x, *_: bool(x[0]), 1),
    "if": (lambda x, *_: 1 if x[0] else 0, 1),
    "tolist": (lambda x, *_: x.tolist(), 1),
    "cpu": (lambda x, *_: x.cpu(), 1),
    "copied to the host": (lambda x, *_: torch.empty(6).copy_(x), 1),
    "copied without waiting": (lambda x, *_: torch.empty(6).copy_(x, non_blocking=True), 0),
    "copied from the host": (lambda x, *_: x.copy_(torch.ones(6)), 1),
    "copied from the host without waiting": (lambda *_: torch.ones(6).to(DEVICE, non_blocking=True), 0),
    "equal": (lambda x, y, _: torch.equal(x, y), 1),
    "nonzero": (lambda x, *_: x.nonzero(), 1),
    "flatnonzero": (lambda x, *_: torch.where(x > 1), 1),
    "selected by a mask": (lambda x, y, _: x[y > 0], 1),
    "written by a mask": (lambda x, y, _: x.__setitem__(y > 0, y), 1),
    "filled by a mask": (lambda x, y, _: x.__setitem__(y > 0, 0.0), 0),
    "chosen by a mask": (lambda x, y, _: torch.where(y > 0, x, y), 0),
    "selected by numbers": (lambda x, _, numbers: x[numbers], 0),
    "repeated": (lambda x, _, numbers: x[:2].repeat_interleave(numbers), 1),
    "repeated to a known size": (lambda x, _, numbers: x[:2].repeat_interleave(numbers, output_size=5), 0),
    "a root": (lambda x, y, _: torch.linalg.cholesky(torch.outer(y, y).fill_diagonal_(9.0)), 1),
    "a root, unchecked": (lambda x, y, _: torch.linalg.cholesky_ex(torch.outer(y, y).fill_diagonal_(9.0)), 0),
    "added": (lambda x, y, _: x.add_(y, alpha=2.0), 0),
}


@pytest.mark.parametrize("name", SYNCS)
def test_the_host_waits_for_values_and_sizes(name: str) -> None:
    work, syncs = SYNCS[name]
    assert counted(work).syncs == syncs


@pytest.mark.parametrize(
    ("work", "copied"),
    [
        (lambda x: torch.ones(6).to(DEVICE), 24),
        (lambda x: x.copy_(torch.ones(6, dtype=torch.float64)), 24),
        (lambda x: torch.tensor([1, 2], device=DEVICE), 16),
        (lambda x: x.cpu(), 0),
        (lambda x: x.to(DEVICE).add_(torch.tensor(1.0)), 0),
        (lambda x: torch.full((6,), 2.0, device=DEVICE), 0),
    ],
)
def test_copies_from_the_host_are_counted(work: Callable[[Tensor], Any], copied: int) -> None:
    assert counted(lambda x, *_: work(x)).copied == copied


@triton.jit  # type: ignore[untyped-decorator]
def _double(x, y, n, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.arange(0, LENGTH)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize("runs_kernels", [False, True])
def test_a_kernel_is_a_launch_that_moves_each_of_its_tensors_once(runs_kernels: bool) -> None:
    found: list[list[float]] = []

    def work(x: Tensor, *_: Tensor) -> None:
        y = torch.empty_like(x)
        pieces.launch(_double, (1,), x, y, 6, LENGTH=8)
        pieces.launch(_double, (1,), y, y, 6, LENGTH=8)
        pieces.launch(_double, (0,), y, y, 6, LENGTH=8)
        found.append(y.cpu().tolist())

    tally = counted(work, runs_kernels=runs_kernels)
    assert tally.by_name == {"_double": 2, "_to_copy": 1}
    assert tally.moved == 48 + 24 + 24
    assert found == [[0.0, 4.0, 8.0, 12.0, 16.0, 20.0] if runs_kernels else [0.0] * 6]


def test_of_a_group_only_what_it_does_beside_the_network_is_counted() -> None:
    with working_on(DEVICE), counting() as tally:
        sent = [Payload.of(torch.full((3,), float(peer), device=DEVICE)) for peer in range(4)]
        tally.clear()
        group = Network(4, tally)
        received, gathered = group.all_to_all(sent), group.all_gather(sent[1])
        group.all_reduce(sent[2].tensors[0])
        assert tally.by_name == {"cat": 1}
        assert [x.tensors[0].tolist() for x in (*received, *gathered, sent[2])] == [[0.0] * 3] * 4 + [[1.0] * 3] * 4 + [
            [8.0] * 3
        ]
