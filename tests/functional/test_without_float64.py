"""Devices without float64, as Apple's GPUs: the meta device stands in for them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normswap
from normswap.functional import labels, moments
from normswap.methods.registry import get_method


class WithoutFloat64(TorchDispatchMode):
    """Refuse float64 on the meta device, and notes copies to it that nobody waits for."""

    def __init__(self):
        super().__init__()
        self.hasty = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64:
                raise TypeError(f"no float64 on this device: {func}")
        if (kwargs or {}).get("non_blocking") and out.is_meta:
            self.hasty.append(func)
        return out


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(moments, "WITHOUT_FLOAT64", ("meta",))
    with WithoutFloat64() as mode:
        yield mode


def convert(name, norm, **options):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, affine=True))
    if get_method(name).needs_context:
        options["contexts"] = 2
    return normswap.convert(model, name, **options)


@pytest.mark.parametrize("name", normswap.methods())
def test_every_method_trains_and_answers(device, name):
    model = convert(name, nn.BatchNorm2d)
    x = torch.empty(4, 3, 8, 8, device="meta")
    given = {"context": torch.zeros(4, dtype=torch.int64)} if get_method(name).needs_context else {}
    assert model(x, **given).sum().backward() is None
    assert model.eval()(x, **given).shape == model(x).shape == (4, 8, 6, 6)
    assert not device.hasty


LAYERS = [("cn", {}), ("cn", {"affine": "shared"}), ("cn-x", {}), ("cn-x", {"statistics": "batch"})]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("context", [None, 1])
def test_layers_tell_the_plain_norm_they_are_and_the_row_of_one_more_context(
    device, norm, name, options, context
):
    layer = convert(name, norm, **options)[1]
    if name == "cn-x" and norm is nn.BatchNorm2d:
        layer.fresh = False  # never trained, it would be the norm that it replaced
    assert all(t.shape[-1:] in ((8,), ()) for t in layer.plain(context) if t is not None)
    assert set(layer.added_rows(context, 0.5)) >= {"priors"}
    if hasattr(layer, "set_moments"):
        layer.set_moments(0, moments.Moments(*torch.ones(2, 8, device="meta")))


def test_acn_tells_the_plain_norm_it_is(device):
    model = convert("acn", nn.BatchNorm2d)
    with pytest.raises(
        RuntimeError, match="with Meta tensors"
    ):  # asks for values, which this device has not
        get_method("acn").plain(model[1], None)


def test_where_labels_are_checked_on_their_device():
    # The host waits for others, and says so in an error of ours: MPS before torch 2.14.
    assert labels._asserts("cuda")
    assert labels._asserts("meta")
    assert not labels._asserts("xpu")
