"""A model's own `train` finds the norms it keeps in eval mode, or conversion is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ConversionError
from tests.support.behave import Both, close, images, randomize


class Kept(Both):
    """Keeps in eval mode what `holds_statistics` chooses."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if self.holds_statistics(module):
                module.eval()
        return self


class ByClass(Kept):
    def holds_statistics(self, module):
        return isinstance(module, nn.BatchNorm2d)


class OfSeveral(Kept):
    def holds_statistics(self, module):
        return isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))


class ByName(Kept):
    def holds_statistics(self, module):
        return "BatchNorm" in module.__class__.__name__


class Applied(Both):
    def train(self, mode=True):
        return super().train(mode).apply(lambda m: isinstance(m, nn.BatchNorm2d) and m.eval())


class OwnEval(ByClass):
    """Switches to eval by itself, in which norms go on training."""

    def eval(self):
        self.train(False)
        for module in self.modules():
            module.training = self.holds_statistics(module)
        return self


class Outer(nn.Sequential):
    """Has a part that keeps its norms in eval mode, and one that does not."""

    def __init__(self):
        super().__init__(ByClass(), Both())


def modes_of(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("kind", [ByClass, OfSeveral, ByName, Applied, OwnEval, Outer])
def test_norms_are_found_as_before(kind, trace):
    model = kind()
    randomize(model)
    converted = normswap.convert(model, "cn", contexts=2, trace=trace, verify=False)
    for switch in (lambda m: m.train(), lambda m: m.eval(), lambda m: m.train(mode=True)):
        for each in (model, converted, copied := copy.deepcopy(converted)):
            switch(each)
        assert modes_of(model) == modes_of(converted) == modes_of(copied)
        close(converted(images(), context="1"), model(images()))
    assert modes_of(normswap.revert(converted, 1).train()) == modes_of(model)


@pytest.mark.parametrize("base", [ByClass, ByName, Applied, OwnEval, Outer])
def test_norms_of_a_method_without_labels_are_found(base):
    kind = type(base.__name__, (base,), {})  # none that another test converted
    model = kind()
    found = [normswap.convert(model, "acn", verify=False)]
    found += [copy.deepcopy(found[0]), pickle.loads(pickle.dumps(normswap.convert(base(), "acn")))]
    for switch in (lambda m: m.train(), lambda m: m.eval(), lambda m: m.train(mode=True)):
        for each in (model, *found):
            switch(each)
        for converted in found:
            assert modes_of(model) == modes_of(converted)


class OfOneType(Kept):
    def holds_statistics(self, module):
        return type(module) is nn.BatchNorm2d


class ByNameOfType(Kept):
    def holds_statistics(self, module):
        return type(module).__name__.startswith("BatchNorm")


@pytest.mark.parametrize("method", ["cn", "acn"])
@pytest.mark.parametrize("kind", [OfOneType, ByNameOfType])
def test_what_nothing_answers_is_refused(kind, method):
    with pytest.raises(ConversionError, match=r"train\(\) of the model .*exclude=BatchNorm2d"):
        normswap.convert(kind(), method, verify=False)
    model = nn.Sequential(kind(), Both())
    with pytest.raises(ConversionError, match=r"train\(\) of 0 .*exclude=BatchNorm2d"):
        normswap.convert(model, method, verify=False)
    normswap.convert(model, method, exclude="0.*", verify=False)


def test_a_loop_called_train_sees_what_is_there():
    converted = normswap.convert(ByClass(), "cn", verify=False)

    def train(model):
        model.train()
        return [isinstance(m, nn.BatchNorm2d) for m in model.modules()]

    assert not any(train(converted))


class Freezable(Both):
    """Freezes norms by a method of its own, as models of segmentation_models_pytorch do."""

    def freeze(self, mode):
        for parameter in self.a.parameters():
            parameter.requires_grad = mode
        for module in self.a.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.train(mode)
        self.frozen = not mode

    def mark_in_eval(self):
        self.eval()
        for module in self.modules():
            module.found = isinstance(module, nn.BatchNorm2d)


def test_a_method_that_freezes_norms_finds_them():
    model = Freezable()
    randomize(model)
    converted = normswap.convert(model, "cn", contexts=2, verify=False)
    for each in (model.train(), converted.train(), copied := copy.deepcopy(converted)):
        each.freeze(False)
    assert modes_of(model) == modes_of(converted) == modes_of(copied)
    close(converted(images(), context="1"), model(images()))
    assert not converted.a.norm.weight.requires_grad
    converted.freeze(True)
    assert converted.a.norm.training
    # What changes what it finds is a tool, which sees what is there.
    converted.mark_in_eval()
    assert not any(module.found for module in converted.modules())


class ByNestedFunction(Both):
    def freeze(self):
        def still(module):
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

        self.apply(still)


class InAList(Both):
    def freeze(self):
        [m.eval() for m in self.modules() if isinstance(m, nn.BatchNorm2d)]


class ByMatch(Both):
    def freeze(self):
        for module in self.modules():
            match module:
                case nn.BatchNorm2d():
                    module.eval()


class ByClassName(Both):
    def freeze(self):
        for module in self.modules():
            if module.__class__.__name__.find("BatchNorm") != -1:
                module.eval()


@pytest.mark.parametrize("method", ["cn", "acn"])
@pytest.mark.parametrize("base", [ByNestedFunction, InAList, ByMatch, ByClassName])
def test_so_does_one_that_asks_in_another_way(base, method):
    model = base().train()
    converted = normswap.convert(model, method, verify=False)
    for each in (model, converted):
        each.freeze()
    assert modes_of(model) == modes_of(converted)
    assert not converted.a.norm.training


class Folding(Both):
    def train(self, mode=True):
        super().train(mode)
        self.gain = None if mode else self.a.norm.weight / self.a.norm.running_var
        return self


class Evaluating(Both):
    def train(self, mode=True):
        super().train(mode)
        self.a.norm.eval()
        self.a.norm.weight.requires_grad = False
        self.a.norm.bias.requires_grad_(False)
        return self


def test_what_is_folded_in_eval_mode_is_told():
    summary = normswap.summary(normswap.convert(Folding(), "cn", verify=False))
    assert summary.norm_reads == ["a.norm.weight", "a.norm.running_var"]
    assert not normswap.summary(normswap.convert(Evaluating(), "cn", verify=False)).norm_reads


class Loop(Both):
    """Has a training loop of that name, as the class that ultralytics' users hold."""

    def train(self, trainer=None, **settings):
        return [isinstance(m, nn.BatchNorm2d) or type(m) is nn.BatchNorm2d for m in self.modules()]


def test_a_training_loop_of_the_model_sees_what_is_there():
    assert not any(normswap.convert(Loop(), "cn", verify=False).train())


class OnlyEval(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class NeverTraining(nn.BatchNorm2d):
    training = property(lambda self: False, lambda self, mode: None)


class Momentum(nn.BatchNorm2d):
    momentum = property(lambda self: 0.5, lambda self, value: None)


class Weight(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, affine=False)
        self.raw = nn.Parameter(torch.zeros(channels))

    weight = property(lambda self: self.raw.exp(), lambda self, value: None)


class Doubled(nn.BatchNorm2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OfInstances(nn.InstanceNorm2d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (OnlyEval, "OnlyEval overrides train,"),
        (type("Below", (OnlyEval,), {}), "OnlyEval overrides train,"),
        (NeverTraining, "computes its training by a property"),
        (Momentum, "computes its momentum by a property"),
        (Weight, "computes its weight by a property"),
        (Doubled, "Doubled overrides __call__,"),
        (OfInstances, "OfInstances overrides train,"),
    ],
)
def test_a_norm_that_is_another_one_in_training_is_refused(kind, what):
    report = normswap.plan(nn.Sequential(kind(4), nn.BatchNorm2d(4)))
    assert [row.action for row in report.rows] == ["refused", "replaced"]
    assert what in report.rows[0].reason


class Harmless(nn.BatchNorm2d):
    momentum = 0.3

    def reset_parameters(self):
        super().reset_parameters()

    def extra_repr(self):
        return "harmless"


def test_a_subclass_that_changes_nothing_is_replaced():
    model = nn.Sequential(Harmless(4))
    converted = normswap.convert(model, "cn", contexts=2, verify=False)
    for _ in range(2):
        close(converted(images(), context="1"), model(images()))
    close(converted.eval()(images(), context="1"), model.eval()(images()))
