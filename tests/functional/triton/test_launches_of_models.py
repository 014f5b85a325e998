"""How many kernels whole models start beside those of the model as it was; see `test_launches`."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.functional import backend
from normswap.functional.labels import resolve_labels
from tests.functional.triton import test_launches
from tests.support.sampling import sampled

counter = test_launches.counter
# By a layer: in a forward of training, in backward, and in a forward of evaluation.
LAYERS = {
    "cn": (
        ("stats", "tables", "apply_and_move"),
        ("dots", "gradients", "combine"),
        ("stats", "tables", "apply"),
    ),
    "cn-x": (("tables", "apply"), ("dots", "gradients"), ("tables", "apply")),
}
# Once a forward: labels are sorted in training, and samples that weigh the contexts have rows.
SORTED = Counter(("remainder", "sort", "arange", "searchsorted"))
ROWS = Counter(("arange", "lt", "where"))
ONCE = {
    "cn": (SORTED + ROWS + Counter(("copy_",)), Counter(), ROWS),
    "cn-x": (SORTED, Counter(), Counter()),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.fixture(params=["resnet50", "efficientnet_b0"])
def model(request, monkeypatch):
    """Return a model without values; all but its norms compute in bfloat16, as by autocast.

    Its device stands for a GPU.
    """
    monkeypatch.setattr(backend, "DEVICES", ("meta",))
    with torch.device("meta"):
        found = timm.create_model(request.param, num_classes=2)
    for module in found.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)
    return found


def started(counter, model, x, labelled=True):
    """Return what a step of training starts forward and backward, and a forward of evaluation."""
    found = []
    model.zero_grad()
    for training in (True, False):
        # Labels that no layer has met, which may be -1 for all the host knows.
        labels = torch.zeros(len(x), device="meta", dtype=torch.int64)
        context = {"context": resolve_labels(labels, 4, "abcd")} if labelled else {}
        counter.started.clear()
        with counter, torch.set_grad_enabled(training):
            y = model.train(training)(x, **context)
        found.append(Counter(counter.started))
        if training:
            dy = torch.ones_like(y)
            counter.started.clear()
            with counter:
                y.backward(dy)
            found.append(Counter(counter.started))
    return found


@pytest.mark.parametrize("layout", sampled(["channels last", "contiguous"], 1))
@pytest.mark.parametrize("method", LAYERS)
def test_a_model_starts_its_layers_and_sorts_its_labels_once(counter, model, method, layout):
    x = torch.empty(2, 3, 64, 64, device="meta", dtype=torch.bfloat16)
    x, model = (t.to(memory_format=LAYOUTS[layout]) for t in (x, model))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    without = started(counter, model, x, labelled=False)
    model = normswap.convert(model, method, contexts=4, verify=False)
    for module in model.modules():
        module.fresh = False
    started(counter, model, x)  # measures which row is of which sample
    found = started(counter, model, x)
    norm = "native_batch_norm"
    own = (Counter({norm: norms, "add_": norms}), Counter({f"{norm}_backward": norms}))
    for before, after, replaced, names, once in zip(
        without, found, (*own, Counter({norm: norms})), LAYERS[method], ONCE[method], strict=True
    ):
        if layout == "channels last" and names is LAYERS[method][1]:
            # Convolutions without values hand back gradients of the other layout, to be copied.
            after["clone"] = before["clone"]
        expected = before - replaced + Counter(dict.fromkeys(names, norms)) + once
        assert after == expected, (after - expected, expected - after)
