"""The queue of earlier embeddings: what it holds, in which order, and what it finds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medpretrain.models import queue as queue_file
from medpretrain.models.queue import Queue


def rows(first, count, width=3):
    """Distinct directions of length 1, numbered."""
    angle = torch.arange(first, first + count, dtype=torch.float64)[:, None] + 1
    return F.normalize(torch.cat([angle.cos(), angle.sin(), angle.sin() * 0.5][:width], dim=1), dim=1)


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 9), max_size=8))
@settings(max_examples=40, deadline=None)
def test_it_holds_the_last_ones_in_a_ring(size, batches):
    """Whatever the batches, also those that wrap around and those that fill it at once: first in, first out."""
    queue = Queue(size, 3).double()
    ring = list(zip(queue.embeddings.clone(), [-1] * size, strict=True))
    seen = 0
    for count in (min(count, size) for count in batches):
        keys, labels = rows(seen, count), torch.arange(seen, seen + count)
        queue.push(keys, labels)
        for key, label in zip(keys, labels.tolist(), strict=True):
            ring[seen % size] = (key, label)
            seen += 1
    assert queue.labels.tolist() == [label for _, label in ring]
    torch.testing.assert_close(queue.embeddings, torch.stack([key for key, _ in ring]), rtol=0, atol=1e-15)
    assert queue.next == seen % size
    assert len(queue) == size


def test_it_starts_with_random_directions_of_unknown_label_from_its_seed():
    queue, same, other = Queue(50, 4, seed=3), Queue(50, 4, seed=3), Queue(50, 4, seed=4)
    torch.testing.assert_close(queue.embeddings.norm(dim=1), torch.ones(50))
    assert (queue.labels == -1).all()
    assert torch.equal(queue.embeddings, same.embeddings)
    assert not torch.equal(queue.embeddings, other.embeddings)


def test_the_random_start_leaves_torchs_own_draws_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    Queue(50, 4, seed=3)
    assert torch.equal(torch.randn(3), expected)


def test_embeddings_are_kept_at_length_1_and_without_a_gradient():
    queue = Queue(4, 3)
    keys = (7 * rows(0, 2)).requires_grad_()
    queue.push(keys)
    torch.testing.assert_close(queue.embeddings[:2], rows(0, 2).float())
    assert not queue.embeddings.requires_grad
    assert queue.embeddings.dtype == torch.float32


def test_without_labels_the_place_of_an_old_one_becomes_unknown():
    queue = Queue(2, 3)
    queue.push(rows(0, 2), torch.tensor([5, 6]))
    queue.push(rows(2, 1))
    assert queue.labels.tolist() == [-1, 6]


def test_a_queue_from_a_state_dict_goes_on_where_the_other_stopped():
    queue = Queue(5, 3, seed=1)
    queue.push(rows(0, 3), torch.tensor([0, 1, 2]))
    resumed = Queue(5, 3, seed=2)
    resumed.load_state_dict(copy.deepcopy(queue.state_dict()))
    for one in (queue, resumed):
        one.push(rows(3, 4), torch.tensor([3, 4, 5, 6]))
    assert queue.labels.tolist() == [5, 6, 2, 3, 4]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in queue.state_dict().items())


def test_nothing_in_it_is_a_parameter():
    assert list(Queue(3, 2).parameters()) == []


def test_more_than_it_holds_cannot_be_pushed():
    with pytest.raises(AssertionError):
        Queue(2, 3).push(rows(0, 3))


@given(size=st.integers(1, 20), queries=st.integers(0, 9), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_nearest_is_the_one_of_highest_cosine(size, queries, seed):
    queue = Queue(size, 4, seed=seed).double()
    torch.manual_seed(seed)
    asked = torch.randn(queries, 4, dtype=torch.float64) * torch.rand(queries, 1, dtype=torch.float64).mul(100)
    found = queue.nearest(asked)
    assert found.shape == (queries, 4)
    for query, neighbour in zip(asked, found, strict=True):
        best = max(queue.embeddings, key=lambda key: F.cosine_similarity(query, key, dim=0).item())
        assert torch.equal(neighbour, best)


def test_the_nearest_is_the_same_whatever_the_block(monkeypatch):
    queue = Queue(11, 4)
    torch.manual_seed(0)
    asked = torch.randn(23, 4, requires_grad=True)
    whole = queue.nearest(asked)
    seen = []
    split = torch.Tensor.split

    def watched(self, rows):
        seen.append(rows)
        return split(self, rows)

    monkeypatch.setattr(torch.Tensor, "split", watched)
    for elements, expected in ((1, 1), (11 * 5, 5), (11 * 100, 100)):
        monkeypatch.setattr(queue_file, "_BLOCK_ELEMENTS", elements)
        assert torch.equal(queue.nearest(asked), whole)
        assert seen.pop() == expected
    assert not whole.requires_grad


def test_of_equal_embeddings_the_first_is_the_nearest():
    queue = Queue(4, 2)
    queue.push(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert queue.nearest(torch.tensor([[0.0, 2.0], [3.0, 0.0]])).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_low_precision_queries_are_compared_in_the_queues_precision():
    queue = Queue(64, 16)
    torch.manual_seed(1)
    asked = torch.randn(8, 16).bfloat16()
    assert torch.equal(queue.nearest(asked), queue.nearest(asked.float()))
    assert queue.nearest(asked).dtype == torch.float32
