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


@pytest.mark.parametrize("masked", [False, True])
def test_arrays_are_labels_of_compiled_models_too_which_then_run_as_they_are(masked):
    torch._dynamo.reset()
    model, x, labels = make_model(), images(), EXPECTED.numpy()
    if masked:
        labels = numpy.ma.array(EXPECTED.clamp(min=0), mask=labels < 0)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x, context=labels), model(x, context=EXPECTED))


def test_arrays_that_code_compiled_whole_cannot_read_are_refused_with_a_way_out():
    torch._dynamo.reset()
    compiled = torch.compile(make_model(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass torch\.as_tensor\(labels\)"):
        compiled(images(), context=EXPECTED.numpy())
