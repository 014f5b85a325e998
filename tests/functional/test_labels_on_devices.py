"""Labels meet their norms on the device of the input, wherever they come from."""

import numpy
import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError
from normswap.functional.labels import resolve_labels
from tests.support.builders import make_batch, trained_norm

NAMES = ("photo", "art", "sketch")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = trained_norm()

    def forward(self, x):
        return self.bn(x)


def convert_norm():
    return normswap.convert(Net().eval(), "cn", contexts=NAMES)


def images():
    return make_batch((4, 4, 3, 5)).float()


def test_labels_on_another_device():
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    with pytest.raises(
        ContextError, match=r"on cpu, where the input of bn is, got it on meta; .* \.to\('cpu'\)"
    ):
        convert_norm()(images(), context=labels)


def test_labels_follow_the_input_to_the_device_of_each_part():
    class Split(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).to("meta"))

    base = Split(trained_norm(), trained_norm()).eval()
    model = normswap.convert(base, "cn", contexts=3, verify=False)
    model[1].to("meta")
    assert model(images(), context=torch.tensor([0, 1, 2, 0])).is_meta


@pytest.mark.parametrize(
    "labels",
    [1, "art", ["photo"] * 4, [0, 1, 2, None], numpy.zeros(4, dtype=int)],
    ids=["index", "name", "names", "indices", "array"],
)
def test_labels_that_are_not_a_tensor_go_to_the_device_of_the_input(labels):
    model = convert_norm().to("meta")
    assert model(images().to("meta"), context=labels).is_meta


def test_labels_in_a_tensor_of_the_host_go_to_the_device_of_the_input_and_stay_known():
    device = torch.device("meta")
    for labels, unknown in ((torch.tensor([0, 2, 1]), False), (torch.tensor([0, -1, 1]), True)):
        found = resolve_labels(labels, 3, "abc", device)
        assert (found.labels.device, found.unknown) == (device, unknown)
    model = convert_norm().to("meta")
    assert model(images().to("meta"), context=torch.tensor([0, 1, 2, 0])).is_meta
    with pytest.raises(ContextError, match="from 0 to 3"):
        model(images().to("meta"), context=torch.tensor([0, 1, 2, 3]))


def test_labels_of_the_host_are_copied_to_a_gpu_without_waiting(monkeypatch):
    calls = []

    def to(self, device, **given):
        calls.append((device.type, given))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for labels in (torch.tensor([0, 1]), ["a", "b"]):
        resolve_labels(labels, 3, "abc", torch.device("cuda"))
    assert calls == ["pinned", ("cuda", {"non_blocking": True})] * 2


def test_labels_that_are_not_a_tensor_are_checked_on_the_host_for_any_device():
    with pytest.raises(ContextError, match="from 0 to 3"):
        convert_norm().to("meta")(images().to("meta"), context=[0, 1, 2, 3])
