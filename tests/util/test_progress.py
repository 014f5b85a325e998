"""The bar over the batches of a loader, whatever is known of its length."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import normswap
from normswap import contexts
from normswap.testing.models import make_model
from normswap.util.batches import show_progress


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


STREAM, LIST = DataLoader(Stream(), 20), list(DataLoader(Stream(), 20))


@pytest.mark.parametrize(
    ("loader", "batches", "total"),
    [(LIST, None, 2), (LIST, 1, 1), (LIST, 9, 2), (STREAM, None, None), (STREAM, 9, 9)],
)
def test_the_total_is_what_is_known(loader, batches, total):
    bar = show_progress(loader, "test", batches)
    assert bar.total == total
    assert len(list(bar)) == (1 if batches == 1 else 2)


@pytest.mark.filterwarnings("ignore::normswap.ContextWarning")
def test_a_stream_without_a_length_is_read_as_a_list_is():
    found = []
    for loader in (STREAM, LIST):
        model = normswap.convert(make_model(), "cn")
        normswap.adapt(model, loader)
        found.append((model.state_dict(), contexts.kmeans(loader, 2).sizes))
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name])
