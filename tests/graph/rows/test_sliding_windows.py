"""Sliding windows over several volumes: each window takes the label of its volume."""

import pytest
import torch
from torch import nn

import normswap

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3))
    model = normswap.convert(net, "cn", contexts=3, verify=False).eval()
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    return model.requires_grad_(False)


def each_alone(infer, model, volumes):
    """Return what a loop over volumes with one label each gives."""
    outputs = []
    for volume, label in zip(volumes, LABELS.tolist(), strict=True):
        with normswap.use_context(model, label):
            outputs.append(infer(volume[None], model))
    return torch.cat(outputs)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_monais_windows_take_the_label_of_their_volume(model, batch):
    monai = pytest.importorskip("monai.inferers.utils")
    volumes = torch.randn(3, 1, 10, 9)

    def infer(x, predictor, **more):
        return monai.sliding_window_inference(x, (4, 4), batch, predictor, overlap=0.25, **more)

    found = infer(
        volumes,
        lambda w, at: model(w, context=LABELS[[i.start for i, *_ in at]]),
        with_coord=True,
    )
    torch.testing.assert_close(found, each_alone(infer, model, volumes))


def infer_by_windows(volumes, batch, predictor):
    """Batch windows of all volumes as MONAI does: the volume's index is the first coordinate."""
    places = [(slice(n, n + 1), slice(None), slice(i, i + 4)) for n in range(3) for i in (0, 4)]
    output = torch.empty(3, 3, 8, 5)
    for start in range(0, len(places), batch):
        at = places[start : start + batch]
        windows = predictor(torch.cat([volumes[place] for place in at]), at)
        for place, window in zip(at, windows, strict=True):
            output[place[0].start][place[1:]] = window
    return output


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_labels_by_coordinates_label_each_window(model, batch):
    volumes = torch.randn(3, 1, 8, 5)
    found = infer_by_windows(
        volumes, batch, lambda w, at: model(w, context=LABELS[[i.start for i, *_ in at]])
    )
    for volume, label, output in zip(volumes, LABELS.tolist(), found, strict=True):
        expected = torch.cat([model(volume[None, :, i : i + 4], context=label) for i in (0, 4)], 2)
        torch.testing.assert_close(output, expected[0])
