"""Teachers: equal at the start, slow afterwards, never trained, never still."""

import pytest
import torch
from torch import nn

from nnssl_ext.models.ema import Teacher, ema_momentum


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_it_starts_as_the_student_and_shares_nothing_with_it():
    student = network().eval()
    teacher = Teacher(encoder=student)
    x = torch.randn(5, 3)
    assert torch.equal(teacher.encoder(x), student(x))
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_it_stays_in_eval_mode_when_the_task_trains():
    """Fails if a teacher drops paths or counts batch statistics of its own."""
    task = nn.ModuleDict({"teacher": Teacher(encoder=network())}).train()
    assert task.training
    assert not any(module.training for module in task["teacher"].modules())


def test_it_follows_by_the_share_that_momentum_leaves():
    student = network()
    teacher = Teacher(encoder=student)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
        student[1].running_mean.fill_(7.0)
    teacher.follow(0.9, encoder=student)
    for old, now in zip(before, teacher.parameters(), strict=True):
        assert torch.allclose(now, old + 0.1, atol=1e-6)
    assert torch.equal(teacher.encoder[1].running_mean, student[1].running_mean)


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_a_teacher_that_never_moves_is_refused(momentum):
    student = network()
    with pytest.raises(ValueError, match="momentum"):
        Teacher(encoder=student).follow(momentum, encoder=student)


def test_momentum_rises_from_start_towards_end_and_never_reaches_it():
    values = [ema_momentum(step, 100, 0.98, 1.0) for step in range(100)]
    assert values[0] == pytest.approx(0.98)
    assert values[50] == pytest.approx(0.99)
    assert values == sorted(values)
    assert 0.9999 < values[-1] < 1
