"""NT-Xent against a loop over pairs, what is no negative, and two processes as one."""

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from nnssl_ext.losses.nt_xent import nt_xent

TEMPERATURE = 0.3


def views(num: int = 5, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    first, noise = torch.randn(2, num, width, generator=torch.Generator().manual_seed(0))
    return first, 3 * (first + 0.5 * noise)


def slow(first: torch.Tensor, second: torch.Tensor, cases: list[int] | None = None) -> tuple[float, float]:
    """For every view: the probability of its other view among all views that may be compared with it."""
    num = len(first)
    rows = [row.double() / row.double().norm() for row in (*first, *second)]
    losses, chances = [], []
    for i in range(2 * num):
        partner = (i + num) % (2 * num)
        candidates = [
            j for j in range(2 * num) if j != i and (j == partner or cases is None or cases[j % num] != cases[i % num])
        ]
        powers = {j: math.exp(float(rows[i] @ rows[j]) / TEMPERATURE) for j in candidates}
        losses.append(-math.log(powers[partner] / sum(powers.values())))
        chances.append(math.log(len(candidates)))
    return sum(losses) / len(losses), sum(chances) / len(chances)


def test_equals_a_loop_over_pairs():
    """Catches a view among its own candidates, partners that are not its own, and lengths that count."""
    assert [value.item() for value in nt_xent(*views(), TEMPERATURE)] == pytest.approx(slow(*views()), rel=1e-5)
    assert nt_xent(*views(), TEMPERATURE)[1].item() == pytest.approx(math.log(9))


def test_samples_of_one_case_are_no_negatives_of_each_other():
    """Catches positives that are left out together with the case's other samples."""
    cases = [7, 8, 7, 9, 7]
    found = nt_xent(*views(), TEMPERATURE, torch.tensor(cases))
    assert [value.item() for value in found] == pytest.approx(slow(*views(), cases), rel=1e-5)
    first, second = (view.clone().requires_grad_() for view in views())
    nt_xent(first, second, TEMPERATURE, torch.tensor([0, 0, 1, 1, 1]))[0].backward()
    assert first.grad.abs().sum(1).min() > 0


def test_further_negatives_count_but_where_they_are_left_out():
    """Catches a queue whose lengths count, and one that is left out for one of the two views alone."""
    (first, second), extra = views(2), 7 * torch.eye(3, 4)
    left_out = torch.tensor([[True, False, False], [False, True, True]])
    loss, chance = nt_xent(first, second, TEMPERATURE, earlier=(extra, left_out))
    rows, losses, numbers = torch.nn.functional.normalize(torch.cat([first, second]), dim=1), [], []
    for i in range(4):
        others = [rows[j] for j in range(4) if j not in (i, (i + 2) % 4)]
        others += [extra[j] / 7 for j in range(3) if not left_out[i % 2, j]]
        logits = torch.stack([rows[(i + 2) % 4], *others]) @ rows[i] / TEMPERATURE
        losses.append(logits.logsumexp(0) - logits[0])
        numbers.append(math.log(len(logits)))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert chance.item() == pytest.approx(sum(numbers) / 4)


def test_without_negatives_loss_and_chance_are_zero():
    first, second = views(3)
    for args in ((first[:1], second[:1], TEMPERATURE), (first, second, TEMPERATURE, torch.zeros(3, dtype=torch.int64))):
        assert [value.item() for value in nt_xent(*args)] == [0, 0]


def test_alike_views_lie_at_chance_and_separated_ones_below():
    same = torch.ones(4, 6)
    loss, chance = nt_xent(same, same, TEMPERATURE)
    assert loss.item() == pytest.approx(chance.item())
    apart = torch.eye(4)
    assert nt_xent(apart, apart, 0.05)[0] < 1e-6


def test_half_precision_is_compared_in_full():
    """Catches a product that autocast rounds to bf16, which at a temperature of .05 moves logits by a tenth."""
    first, second = views(8, 64)
    expected = nt_xent(first, second, 0.05)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(first, second, 0.05)[0]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def _rank(rank: int, first: torch.Tensor, second: torch.Tensor, cases: torch.Tensor, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = [
        tensor.chunk(2)[rank].clone().requires_grad_(tensor.is_floating_point()) for tensor in (first, second, cases)
    ]
    loss, chance = nt_xent(own[0], own[1], TEMPERATURE, own[2])
    loss.backward()
    torch.save((loss.detach(), chance, own[0].grad, own[1].grad), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path):
    """Catches negatives of one rank alone, and gathered rows without gradient: DDP takes the mean over the ranks."""
    first, second = (view.requires_grad_() for view in views(6))
    cases = torch.tensor([0, 1, 2, 0, 3, 4])  # one case lies on both ranks
    loss, chance = nt_xent(first, second, TEMPERATURE, cases)
    loss.backward()
    multiprocessing.spawn(_rank, (first.detach(), second.detach(), cases, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, expected in enumerate((loss.detach(), chance)):
        torch.testing.assert_close((results[0][number] + results[1][number]) / 2, expected)
    for number, expected in ((2, first.grad), (3, second.grad)):
        torch.testing.assert_close(torch.cat([result[number] for result in results]) / 2, expected)
