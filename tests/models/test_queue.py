"""Queues of features: first in, first out, of a bounded length, and the same in every process."""

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from nnssl_ext.models.queue import EMPTY, FeatureQueue, all_rows, case_keys


def rows(*values: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.tensor(values)
    return keys[:, None].expand(-1, 2).float(), keys


def held(queue: FeatureQueue) -> list[int]:
    assert torch.equal(queue.rows[:, 0].long()[queue.keys != EMPTY], queue.keys[queue.keys != EMPTY])
    return sorted(queue.keys[queue.keys != EMPTY].tolist())


def test_the_oldest_leave_first():
    queue = FeatureQueue(4, 2)
    for values, expected in (((1, 2), [1, 2]), ((3,), [1, 2, 3]), ((4, 5), [2, 3, 4, 5]), ((6, 7), [4, 5, 6, 7])):
        queue.push(*rows(*values))
        assert held(queue) == expected


def test_of_more_than_fit_the_last_stay_and_none_fit_an_empty_queue():
    queue, none = FeatureQueue(3, 2), FeatureQueue(-2, 2)
    queue.push(*rows(1, 2, 3, 4, 5))
    assert held(queue) == [3, 4, 5]
    queue.push(*rows(6))
    assert held(queue) == [4, 5, 6]
    none.push(*rows(1, 2))
    assert none.rows.shape == (0, 2)


def test_what_is_not_finite_leaves_its_place_empty():
    """Fails if it is held: whatever is compared with the queue would be no number."""
    queue, (features, keys) = FeatureQueue(4, 2), rows(1, 2, 3)
    features = features.clone()
    features[1, 0] = torch.nan
    queue.push(features, keys)
    assert held(queue) == [1, 3]
    assert queue.rows.isfinite().all()


def test_it_goes_on_where_it_was_saved():
    queue, resumed = FeatureQueue(3, 2), FeatureQueue(3, 2)
    queue.push(*rows(1, 2))
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.push(*rows(3, 4))
    assert held(queue) == held(resumed) == [2, 3, 4]


def test_cases_have_keys_of_their_own_that_no_empty_place_has():
    keys = case_keys(("a", "b", "a"), torch.device("cpu"))
    assert keys[0] == keys[2] != keys[1]
    assert keys.min() >= 0 > EMPTY


def _rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(all_rows(torch.tensor([[rank, 0], [rank, 1]])), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_rows_of_two_processes_come_in_the_order_of_ranks_on_both(tmp_path: Path):
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert torch.equal(all_rows(torch.ones(2, 3)), torch.ones(2, 3))
