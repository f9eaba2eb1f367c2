"""Balanced assignment: against plain loops, with a planted answer, and in two processes as in one."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from nnssl_ext.losses.sinkhorn import sinkhorn


def scores(num: int = 6, prototypes: int = 4, seed: int = 0) -> torch.Tensor:
    """Asymmetric: one prototype is liked by all, and no two columns are alike."""
    draws = torch.rand(num, prototypes, generator=torch.Generator().manual_seed(seed))
    return draws + torch.arange(prototypes) / 2


def slow(values: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """Plain sums in float64, prototype by prototype and sample by sample."""
    mass = (values.double() / temperature).exp().tolist()
    for _ in range(iterations):
        for k in range(len(mass[0])):
            column = sum(row[k] for row in mass)
            for row in mass:
                row[k] /= column
        mass = [[value / sum(row) for value in row] for row in mass]
    return torch.tensor(mass)


@pytest.mark.parametrize(("num", "prototypes"), [(6, 4), (3, 7), (1, 5)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_the_slow_version(num, prototypes, iterations):
    """Catches a result that is reshaped and not transposed: nowhere are there as many samples as prototypes."""
    values = scores(num, prototypes)
    assert torch.allclose(sinkhorn(values, 0.5, iterations), slow(values, 0.5, iterations), atol=1e-6)


def test_a_planted_assignment_is_found_although_one_prototype_attracts_all():
    """Catches no balance (argmax gives one prototype), and a result that is scrambled on its way out."""
    planted = torch.arange(12) % 4
    values = 0.3 * torch.nn.functional.one_hot(planted, 4) + torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert (values.argmax(1) == 3).all()
    found = sinkhorn(values, 0.05)
    assert torch.equal(found.argmax(1), planted)
    assert found.max(1).values.min() > 0.9
    assert torch.allclose(found.sum(0), torch.full((4,), 3.0), atol=1e-3)


def test_rows_that_do_not_count_leave_the_others_as_they_are():
    values, counted = scores(8), torch.tensor([True, False, True, True, False, True, True, False])
    assert torch.allclose(sinkhorn(values, 0.5, 3, counted)[counted], sinkhorn(values[counted], 0.5), atol=1e-6)
    assert torch.isfinite(sinkhorn(values, 0.5, 3, torch.zeros(8, dtype=torch.bool))).all()


def test_a_sharp_temperature_does_not_overflow():
    found = sinkhorn(1e3 * scores(), 1e-3)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(1), torch.ones(6))


def test_few_samples_among_many_prototypes_get_flat_targets():
    """The reason to refuse it there: the largest probability is about samples / prototypes."""
    assert sinkhorn(scores(4, 64), 0.05, 10).max() <= 4 / 64 * 1.05


def _rank(rank: int, parts: list[torch.Tensor], folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(parts))
    counted = torch.arange(len(parts[rank])) != 1
    torch.save((sinkhorn(parts[rank], 0.5), sinkhorn(parts[rank], 0.5, 3, counted)), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_with_unequal_shares_give_what_one_gives(tmp_path: Path):
    """Catches columns that are summed on each rank alone, or over shifts by a largest score of its own."""
    values = scores(7)
    parts = list(values.split([3, 4]))
    multiprocessing.spawn(_rank, (parts, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    counted = torch.tensor([True, False, True, True, False, True, True])
    for number, expected in enumerate((sinkhorn(values, 0.5), sinkhorn(values, 0.5, 3, counted))):
        assert torch.allclose(torch.cat([result[number] for result in results]), expected, atol=1e-6)
