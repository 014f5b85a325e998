"""Converted models in the hands of other tools: traced, scripted, fused, loaded."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.utils.model import reparameterize_model
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import normswap
from tests.support.behave import LABELS, Block, Holder, call, close, images, randomize, separate

METHODS = ["cn", "cn-x", "acn"]
OTHER = LABELS.flip(0)


class Net(Holder):
    def __init__(self):
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True))

    def forward(self, x):
        return self.b(self.norms(self.a(x)))

    def fuse(self, verbose=False):
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path):
        return cls()


class Labelled(nn.Module):
    """Takes the labels by position, for tools that take nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        return self.model(x, context=labels)


def make(method, net=Net):
    model = net().eval()
    randomize(model)
    labelled = method != "acn"
    converted = normswap.convert(model, method, contexts=3 if labelled else None, verify=False)
    if labelled:
        separate(converted)
    return converted, {"context": LABELS} if labelled else {}


@pytest.mark.parametrize("method", METHODS)
def test_symbolic_trace_hands_on_the_context(method):
    converted, given = make(method)
    graph = fx.symbolic_trace(converted)
    for labels in (LABELS, OTHER, LABELS - 1) if given else (None,):
        extra = {"context": labels} if given else {}
        close(call(graph, (images(),), **extra), call(converted, (images(),), **extra))
    close(call(graph, (images(),)), call(converted, (images(),)))
    if given:
        with normswap.use_context(graph, LABELS):
            close(call(graph, (images(),)), call(converted, (images(),), **given))


def test_a_wrapper_is_traced_with_its_converted_model():
    converted, _ = make("cn")
    graph = fx.symbolic_trace(Labelled(converted))
    for labels in (LABELS, OTHER):
        close(call(graph, (images(), labels)), call(converted, (images(),), context=labels))


def test_containers_that_are_leaves_of_a_trace_take_the_context():
    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Block) or super().is_leaf_module(module, name)

    converted, given = make("cn")
    graph = fx.GraphModule(converted, Leaves().trace(converted))
    close(call(graph, (images(),), **given), call(converted, (images(),), **given))


@pytest.mark.parametrize("method", METHODS)
def test_feature_extraction_of_torchvision(method):
    model = torchvision.models.resnet18(num_classes=3).eval()
    labelled = method != "acn"
    converted = normswap.convert(model, method, contexts=3 if labelled else None, verify=False)
    separate(converted)
    features = create_feature_extractor(converted, {"layer2": "middle", "fc": "end"})
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"context": torch.tensor([0, 2])} if labelled else {}
    seen = []
    converted.layer2.register_forward_hook(lambda module, args, output: seen.append(output))
    end = call(converted, (x,), **given)
    with torch.no_grad():
        found = features(x, **given)
    close([found["end"]], end)
    close([found["middle"]], seen)


def test_inserted_layers_are_not_lost_in_a_symbolic_trace():
    converted = normswap.convert(nn.Sequential(Block(), Block()), "crossnorm", verify=False)
    with pytest.raises(normswap.ConversionError, match=r"normswap\.specialize"):
        fx.symbolic_trace(converted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradients", [False, True])
def test_jit_trace_takes_any_labels_and_any_batch(method, gradients):
    converted, given = make(method)
    model = Labelled(converted) if given else converted
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (images(), LABELS) if given else (images(),))
    for labels in (LABELS, OTHER, LABELS - 1, torch.full((4,), -1)):
        extra = (labels,) if given else ()
        close(call(traced, (images(), *extra)), call(model, (images(), *extra)))
        short = [t[:3] for t in (images(), *extra)]
        close(call(traced, short), call(model, short))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_jit_trace_takes_images_of_swapped_axes(method):
    labelled = normswap.get_method(method).needs_context
    base, x = nn.Sequential(nn.BatchNorm2d(6)).eval(), torch.randn(4, 6, 3, 5).transpose(2, 3)
    converted = normswap.convert(base, method, **({"contexts": 3} if labelled else {}))
    given = (x, torch.tensor([0, 2, -1, 1])) if labelled else (x,)
    with torch.no_grad():
        traced = torch.jit.trace(converted, given)
        close(traced(*given), base(x))
        close(traced(*(t[:3] for t in given)), base(x[:3]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("method", METHODS)
def test_scripting_names_the_way_out(method):
    converted, _ = make(method)
    for part in (converted, converted.a, converted.norms):
        with pytest.raises(normswap.ConversionError, match=r"normswap\.specialize"):
            torch.jit.script(part)
    torch.jit.script(normswap.specialize(normswap.convert(Block(), "cn", verify=False)))


def test_fusing_names_the_way_out():
    converted, _ = make("cn")
    before = copy.deepcopy(converted.state_dict())
    with pytest.raises(normswap.ConversionError, match=r"Net\.fuse\(\).*normswap\.specialize"):
        converted.fuse(verbose=True)
    torch.testing.assert_close(converted.state_dict(), before)
    with pytest.raises(NotImplementedError):
        normswap.specialize(converted, 1).fuse()


@pytest.mark.parametrize("name", ["levit_128s", "repvgg_a0"])
def test_reparameterizing_a_timm_model(name):
    model = timm.create_model(name, num_classes=3).eval()
    converted = normswap.convert(model, "cn", contexts=2, verify=False)
    with pytest.raises(normswap.ConversionError, match=r"normswap\.specialize"):
        reparameterize_model(converted)
    fused = reparameterize_model(normswap.specialize(converted, 0))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fuse", [lambda self, one, other: one + other, lambda self, *x: sum(x)])
def test_a_method_that_fuses_what_it_is_given_is_none_that_fuses_norms(fuse):
    class Fusing(Net):
        def forward(self, x):
            return self.fuse(self.a(x), self.b(x))

    Fusing.fuse = fuse

    converted, given = make("cn", Fusing)
    assert converted.fuse(1, 2) == 3
    assert call(converted, (images(),), **given)


def test_the_class_of_a_converted_model_makes_no_pretrained_one():
    converted, _ = make("cn")
    with pytest.raises(normswap.ConversionError, match=r"normswap\.load"):
        type(converted).from_pretrained("somewhere")
    assert type(Net.from_pretrained("somewhere")) is Net


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_weights_for_other_contexts_say_so(method):
    three, _ = make(method)
    two = normswap.convert(Net(), method, contexts=2, verify=False)
    with pytest.raises(RuntimeError, match=r"of 2 contexts.*normswap\.load"):
        two.load_state_dict(three.state_dict())
