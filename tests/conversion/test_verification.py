"""Outputs are compared with the original's, and nothing that was not compared counts as equal."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError, VerificationError
from tests.support.models import make_inputs, make_model


def verification(model, method="cn", **given):
    if method == "cn":
        given = {"contexts": 2, **given}
    return normswap.summary(normswap.convert(model, method, **given)).verification


class Reader(nn.Module):
    """A norm and a tail that a test chooses."""

    def __init__(self, tail):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.tail = tail

    def forward(self, x):
        return self.tail(self.bn(x))


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_channels_are_read_from_the_model_where_its_configuration_says_others():
    found = verification(timm.create_model("test_resnet", in_chans=1))
    assert set(found.differences) == {"unknown", "0", "1"}
    assert found.largest < 1e-5


def test_the_size_is_read_from_the_model_where_its_configuration_says_another():
    # maxvit keeps tables of relative positions, which fit one size alone.
    model = timm.create_model("maxvit_pico_rw_256", img_size=64, pretrained=False)
    assert verification(model).largest < 1e-4


def test_a_convolution_behind_a_rearrangement_does_not_mislead():
    class Shuffled(Reader):
        def __init__(self):
            super().__init__(nn.Identity())
            self.pretrained_cfg = {"input_size": (3, 8, 8)}
            self.bn = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.BatchNorm2d(4))

    assert verification(Shuffled()).largest < 1e-5


def test_a_model_that_fails_on_a_guess_is_converted_and_said_not_to_be_verified():
    model = Reader(lambda y: y + torch.zeros(5, 5))
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    found = verification(model)
    assert found.reason.startswith("the model did not run on a guessed input (2, 3, 8, 8)")
    assert "must match the size" in found.reason
    assert found.reason.endswith("pass example_inputs=")
    assert verification(model, example_inputs=IMAGES[..., :5, :5]).reason == ""


@pytest.mark.parametrize(
    "given", ["images.pt", 3, 2.5, True, {1: IMAGES}, print, {IMAGES}, nn.ReLU]
)
@pytest.mark.parametrize("verify", [True, False])
def test_what_are_no_inputs_is_an_error(given, verify):
    with pytest.raises(ConversionError, match="expected example_inputs= as a tensor, a tuple"):
        normswap.convert(make_model(), "cn", contexts=2, example_inputs=given, verify=verify)


def test_inputs_the_original_fails_on_are_an_error_that_says_so():
    model = make_model()
    with pytest.raises(ConversionError, match=r"the original model itself fails .*RuntimeError: "):
        normswap.convert(model, "cn", contexts=2, example_inputs=IMAGES[:, :2])
    with pytest.raises(ConversionError, match=r"the original model itself fails .*missing 1 req"):
        normswap.convert(model, "cn", contexts=2, example_inputs=())


@pytest.mark.parametrize("method", ["cn", "acn", "crossnorm"])
def test_inputs_that_are_not_finite_verify_nothing(method):
    found = verification(Reader(nn.Identity()), method, example_inputs=IMAGES * torch.nan)
    assert found.reason.startswith("nothing finite was compared")
    assert found.differences == {}
    assert math.isnan(found.largest)
    assert str(found).startswith("not verified: nothing finite")


def test_statistics_that_are_not_finite_verify_nothing():
    model = make_model()
    model.neck.running_var.fill_(torch.nan)
    found = verification(model, example_inputs=make_inputs(model))
    assert found.reason.startswith("nothing finite was compared")


def test_a_context_whose_rows_alone_are_not_finite_is_named():
    x = IMAGES.clone()
    x[1::2] = torch.nan
    found = verification(Reader(nn.Identity()), example_inputs=x)
    assert found.reason == "nothing finite was compared (context 1)"


def test_rows_that_are_not_finite_beside_others_that_are_do_not_hide_them():
    x = IMAGES.clone()
    x[1] = torch.nan
    assert verification(Reader(nn.Identity()), example_inputs=x).largest < 1e-6


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (lambda y: torch.zeros_like(y), "every output is zero"),
        (lambda y: y.argmax(1), "nothing finite was compared"),
        (lambda y: y.flatten(1)[:, :0], "nothing finite was compared"),
        (lambda y: object(), "nothing finite was compared"),
        (lambda y: y / 0, "nothing finite was compared"),
    ],
    ids=["zeros", "integers", "empty", "no tensor", "infinite"],
)
def test_outputs_that_tell_nothing_are_no_pass(tail, reason):
    assert verification(Reader(tail), example_inputs=IMAGES).reason.startswith(reason)


@pytest.mark.parametrize(
    "tail",
    [
        lambda y: torch.fft.fft(y),
        lambda y: y.to_sparse(),
        lambda y: {"a": [y]},
        lambda y: y.relu_(),
        lambda y: y.half(),
    ],
    ids=["complex", "sparse", "nested", "in place", "half"],
)
def test_outputs_of_many_kinds_are_compared(tail):
    found = verification(Reader(tail), example_inputs=IMAGES)
    assert found.reason == ""
    assert found.scale > 1


def spoil(base, change):
    """Return a converted model, changed."""
    model = normswap.convert(base, "cn", contexts=2, verify=False)
    with torch.no_grad():
        change(model.bn)
    return model


@pytest.mark.parametrize(
    ("tail", "change", "what"),
    [
        (lambda y: torch.fft.fft(y), lambda bn: bn.weight.mul_(1.1), ""),
        (nn.Identity(), lambda bn: bn.weight[1].mul_(1.1), ""),
        (nn.Identity(), lambda bn: bn.running_mean[1].fill_(torch.nan), "that were finite are not"),
        (lambda y: y / 0, lambda bn: bn.weight.neg_(), "that were not finite are something else"),
    ],
    ids=["complex", "one context", "not finite", "sign of infinity"],
)
def test_a_model_that_computes_something_else_is_found_out(tail, change, what):
    base = Reader(tail)
    with pytest.raises(VerificationError, match=f"another function.*{what}"):
        normswap.verify(spoil(base, change), base, IMAGES)


def test_a_model_that_fails_where_the_original_runs_is_found_out():
    base = Reader(nn.Identity())
    model = normswap.convert(base, "cn", contexts=2)
    model.tail = nn.Linear(1, 1)
    with pytest.raises(VerificationError, match=r"fails where the original runs \(RuntimeError"):
        normswap.verify(model, base, IMAGES)


def test_inputs_a_forward_changes_in_place_are_left_and_given_anew_to_each_run():
    base = Reader(nn.Identity())
    base.bn = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3))
    x = IMAGES.clone()
    assert verification(base, example_inputs=x - 0.5).reason == ""
    verification(base, example_inputs=x)
    assert torch.equal(x, IMAGES)


def test_an_output_that_is_a_buffer_of_the_model_is_compared_as_it_was_returned():
    class Keeps(Reader):
        def __init__(self):
            super().__init__(nn.Identity())
            self.register_buffer("last", torch.zeros(4, 3, 6, 6))

        def forward(self, x):
            return self.last.copy_(self.bn(x))

    assert verification(Keeps(), example_inputs=IMAGES).scale > 1


def test_verify_refuses_a_converted_original():
    base = Reader(nn.Identity())
    model = normswap.convert(base, "cn", contexts=2, inplace=True)
    with pytest.raises(ConversionError, match="would be compared with itself"):
        normswap.verify(model, base, IMAGES)
    with pytest.raises(ConversionError, match="would be compared with itself"):
        normswap.verify(model, copy.deepcopy(model), IMAGES)


@pytest.mark.parametrize("given", [None, IMAGES * torch.nan], ids=["nothing", "nan"])
def test_verify_raises_where_nothing_was_compared(given):
    base = Reader(nn.Identity())
    model = normswap.convert(base, "cn", contexts=2)
    with pytest.raises(ConversionError, match="nothing to verify on: "):
        normswap.verify(model, base, given)


def test_a_model_without_values_is_said_not_to_be_verified():
    with torch.device("meta"):
        base = Reader(nn.Identity())
    found = verification(base, example_inputs=IMAGES)
    assert found.reason == "the model has no values (meta device)"
    model = normswap.convert(Reader(nn.Identity()), "cn", contexts=2)
    with pytest.raises(ConversionError, match="nothing to verify on: the model has no values"):
        normswap.verify(model, base, IMAGES)


def test_a_list_of_images_has_one_label_each():
    class Detector(Reader):
        def forward(self, images):
            return self.bn(torch.stack(images))

    found = verification(Detector(nn.Identity()), contexts=5, example_inputs=(list(IMAGES[:2]),))
    assert set(found.differences) == {"unknown", "0", "1", "2", "3", "4"}


@pytest.mark.parametrize("method", ["cn", "acn"])
def test_a_norm_by_itself_is_verified(method):
    options = {"contexts": 2} if method == "cn" else {}
    norm = nn.BatchNorm2d(3).eval()
    found = normswap.summary(
        normswap.convert(norm, method, example_inputs=torch.randn(2, 3, 4, 4), **options)
    )
    assert found.verification.largest < 1e-5
