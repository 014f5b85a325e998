"""Labels are sorted once where they stay the same, and anew where they don't."""

import torch

from normswap.functional.label_rows import labels_per_row
from normswap.functional.labels import resolve_labels
from normswap.functional.triton.sorting import find_rows, sort_labels

NAMES = ("a", "b", "c")
GIVEN = [2, 0, -1, 0, 2]


def resolve(labels):
    return resolve_labels(labels, 3, NAMES)


def order_and_offsets(labels, contexts):
    number = len(labels)
    _, *found = sort_labels(labels, contexts).split([number, number, contexts + 2])
    return [t.tolist() for t in found]


def test_instances_by_context_in_their_order_and_those_without_one_last():
    assert order_and_offsets(torch.tensor(GIVEN), 3) == [[1, 3, 0, 4, 2], [0, 2, 2, 4, 5]]
    assert order_and_offsets(torch.full((4,), -1), 3)[1] == [0, 0, 0, 0, 4]


def test_instances_without_a_context_have_rows_of_their_own_after_those_of_contexts():
    labels = resolve(torch.tensor(GIVEN)).labels
    assert find_rows(labels, 3).tolist() == [2, 0, 5, 0, 2]
    assert find_rows(labels, 3) is find_rows(labels, 3)
    assert find_rows(torch.tensor([-1]).expand(3), 4).tolist() == [4, 5, 6]


def test_rows_order_and_offsets_lie_one_after_the_other():
    for own, rows in ((False, [1, 2, 0]), (True, [1, 3, 0])):
        found = sort_labels(torch.tensor([1, -1, 0]), 2, own)
        assert found.tolist() == [*rows, *(2, 0, 1), *(0, 1, 2, 3)]


def test_checked_labels_are_sorted_once():
    labels = resolve(torch.tensor(GIVEN)).labels
    assert sort_labels(labels, 3) is sort_labels(labels, 3)
    for given in (GIVEN, [NAMES[k] for k in (1, 2)]):
        labels = resolve(given).labels
        assert sort_labels(labels, 3) is sort_labels(labels, 3)


def test_not_for_other_numbers_of_contexts_nor_for_labels_that_nobody_checked():
    labels = resolve(torch.tensor(GIVEN)).labels
    assert len(sort_labels(labels, 3)) == 2 * len(GIVEN) + 5
    assert len(sort_labels(labels, 4)) == 2 * len(GIVEN) + 6
    labels = torch.tensor(GIVEN)
    assert sort_labels(labels, 3) is not sort_labels(labels, 3)


def test_labels_that_were_written_to_are_sorted_anew():
    given = torch.tensor(GIVEN)
    labels = resolve(given).labels
    sort_labels(labels, 3)
    given.zero_()
    assert order_and_offsets(labels, 3)[1] == [0, 5, 5, 5, 5]


def test_each_forward_has_labels_of_its_own():
    given = torch.tensor(GIVEN)
    assert sort_labels(resolve(given).labels, 3) is not sort_labels(resolve(given).labels, 3)


def test_labels_of_folded_rows_are_made_and_sorted_once():
    context, x = resolve(torch.tensor(GIVEN)), torch.empty(10, 4)
    found = [labels_per_row(context, x, "", how) for how in ("repeated", "folded", "repeated")]
    assert found[0] is found[2]
    assert found[0].tolist() == 2 * GIVEN
    assert found[1].tolist() == [label for label in GIVEN for _ in range(2)]
    assert sort_labels(found[0], 3) is sort_labels(found[2], 3)
    order = torch.arange(9, -1, -1) // 2
    permuted = labels_per_row(context, x, "", "permuted", order)
    assert permuted.tolist() == [GIVEN[n] for n in order]
    assert labels_per_row(context, x, "", "permuted", order) is permuted
    assert labels_per_row(context, x, "", "permuted", order.clone()) is not permuted


def test_one_label_for_all_is_sorted_once_for_each_number_of_rows():
    context = resolve("b")
    for rows in (4, 6):
        labels = [labels_per_row(context, torch.empty(rows, 2), "") for _ in range(2)]
        assert sort_labels(labels[0], 3) is sort_labels(labels[1], 3)
        assert order_and_offsets(labels[0], 3)[1] == [0, 0, rows, rows, rows]


def test_parts_of_labels_are_sorted_apart():
    labels = resolve(torch.tensor(GIVEN)).labels
    found = [order_and_offsets(part, 3)[1] for part in (labels[:2], labels[3:])]
    assert found == [[0, 1, 1, 2, 2], [0, 1, 1, 2, 2]]
    found = [order_and_offsets(part, 3)[1] for part in (labels[:1], labels[1:2])]
    assert found == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
