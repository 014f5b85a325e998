"""Labels in arrays and tensors that say more than their numbers: masks, dates, inference mode."""

import numpy
import pytest
import torch

from normswap import ContextError
from tests.functional.test_labels import EXPECTED, images, make_model


@pytest.mark.parametrize("hidden", [0, 99])
def test_what_a_masked_array_masks_is_unknown(hidden):
    model, x = make_model(), images()
    values = numpy.where(EXPECTED >= 0, EXPECTED, hidden)
    labels = numpy.ma.array(values, mask=(EXPECTED < 0).numpy())
    assert torch.equal(model(x, context=labels), model(x, context=EXPECTED))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (numpy.zeros(4, dtype="datetime64[D]"), r"got datetime.date\(1970, 1, 1\)"),
        (numpy.zeros(4, dtype=[("site", int)]), r"got \(0,\) \(tuple\)"),
        ([torch.tensor(True)] * 4, "got a tensor .* of bool"),
    ],
)
def test_arrays_and_lists_of_anything_but_integers_and_names_are_refused(labels, match):
    with pytest.raises(ContextError, match=f"names, indices or None, {match}"):
        make_model()(images(), context=labels)


@pytest.mark.parametrize("training", [True, False])
def test_labels_made_in_inference_mode_serve_outside_of_it(training):
    known = EXPECTED.clamp(min=0)
    with torch.inference_mode():
        made = known.clone()
    gradients = []
    for labels in (made, known):
        model = make_model().train(training)
        model(images(), context=labels).sum().backward()
        gradients.append(model.bn.weight.grad)
    assert torch.equal(*gradients)
