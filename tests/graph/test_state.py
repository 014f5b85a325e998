"""What a forward reads may change after conversion, what it writes is written at each run."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, Holder, call, check, close, images


class Scaled(Holder):
    def __init__(self):
        super().__init__()
        self.scale = 1
        self.act = F.relu
        self.extra = None
        self.blocks = nn.ModuleList([nn.ModuleDict({"block": Block()})])

    def forward(self, x):
        y = self.act(self.b(self.a(x)) * self.scale)
        for block in self.blocks:
            y = block["block"](y)
        if self.extra is not None:
            y = self.extra(y)
        return y


class Tabled(Holder):
    def __init__(self):
        super().__init__()
        self.table = {"gain": 1.0}

    def forward(self, x):
        return self.b(self.a(x)) * self.table["gain"]


class Optioned(Holder):
    def __init__(self):
        super().__init__()
        self.options = types.SimpleNamespace(twice=False, deep=types.SimpleNamespace(shift=0))

    def forward(self, x):
        y = self.b(self.a(x))
        return y * 2 + self.options.deep.shift if self.options.twice else y


def _change(model, name):
    if name == "scale":
        model.scale = 3
    elif name == "function":
        model.act = torch.tanh
    elif name == "setting":
        model.options.twice = True
    elif name == "nested setting":
        model.options.twice = True
        model.options.deep.shift = 5
    elif name == "dict":
        model.table["gain"] = 0.5
    elif name == "new module":
        model.extra = nn.Softplus()
    elif name == "more children":
        model.blocks.append(nn.ModuleDict({"block": nn.Softplus()}))
    elif name == "replaced child":
        model.b = nn.Softplus()


CHANGES = ["scale", "function", "new module", "more children", "replaced child"]
OPAQUE = {
    "setting": (Optioned, "reads .options, a SimpleNamespace"),
    "nested setting": (Optioned, "reads .options, a SimpleNamespace"),
    "dict": (Tabled, "reads .table, a dict"),
}


@pytest.mark.parametrize("name", [*CHANGES, *OPAQUE])
def test_a_change_after_conversion_takes_effect(name):
    kind, opaque = OPAQUE.get(name, (Scaled, None))
    model = kind()
    check(model, opaque=opaque)
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    call(converted, (images(),))
    for changed in (model, converted):
        _change(changed, name)
    close(call(converted, (images(),), context=LABELS), call(model, (images(),)))


def test_a_module_removed_after_conversion():
    model = Scaled()
    model.extra = nn.Softplus()
    converted = check(model)
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    model.extra = converted.extra = None
    close(call(converted, (images(),)), call(model, (images(),)))


class Writer(Holder):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.last = None
        self.kept = [torch.zeros(1)]
        self.box = types.SimpleNamespace(count=0)
        self.register_buffer("average", torch.zeros(CHANNELS))

    def forward(self, x):
        y = self.a(x)
        if self.kind == "attribute":
            self.last = y
        elif self.kind == "list":
            self.kept[0] = y
        elif self.kind == "object":
            self.box.count += 1
            self.box.last = y
        elif self.kind == "buffer":
            self.average.mul_(0.5).add_(y.detach().mean((0, 2, 3)))
        return self.b(y)


@pytest.mark.parametrize("kind", ["attribute", "list", "object", "buffer"])
def test_what_a_forward_writes(kind):
    model = Writer(kind)
    converted = normswap.convert(model.eval(), "cn", contexts=3, verify=False)
    assert torch.equal(converted.kept[0], torch.zeros(1))
    assert vars(converted.box) == {"count": 0}
    for _ in range(2):
        call(converted, (images(),), context=LABELS)
        call(model, (images(),))
    if kind == "attribute":
        close([converted.last], [model.last])
    elif kind == "list":
        close([converted.kept[0]], [model.kept[0]])
    elif kind == "object":
        assert converted.box.count == model.box.count == 2
        close([converted.box.last], [model.box.last])
    else:
        close([converted.average], [model.average])


def test_copies_and_pickles_compute_the_same():
    converted = check(Scaled())
    expected = call(converted, (images(),), context=LABELS)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        close(call(other, (images(),), context=LABELS), expected)
        assert type(other).__name__ == "Scaled"


def test_the_checkpoint_of_the_original_restores_its_function():
    model = Scaled()
    converted = check(model)
    assert not converted.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    close(call(converted, (images(),), context=LABELS), call(model, (images(),)))


def test_functional_call_with_other_parameters():
    converted = check(Scaled())
    tensors = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    doubled = {k: v * 2 if k.endswith("conv.bias") else v for k, v in tensors.items()}
    called = torch.func.functional_call(converted, doubled, (images(),), {"context": LABELS})
    converted.load_state_dict(doubled, strict=False)
    close([called.detach()], call(converted, (images(),), context=LABELS))


KINDS = [("cn", {}), ("cn", {"affine": "shared"}), ("cn-x", {}), ("cn-x", {"statistics": "batch"})]


@pytest.mark.parametrize("part", ["buffers", "parameters", "running"])
@pytest.mark.parametrize(("method", "options"), KINDS)
def test_a_part_of_a_state_dict_changes_that_part_alone(method, options, part):
    one, other = (normswap.convert(Scaled(), method, contexts=3, **options) for _ in range(2))
    with torch.no_grad():
        for model in (one, other):
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
    wanted = {
        "buffers": dict(one.named_buffers()),
        "parameters": dict(one.named_parameters()),
        "running": {n: b + 1 for n, b in one.named_buffers() if "running" in n},
    }[part]
    expected = {**copy.deepcopy(other.state_dict()), **copy.deepcopy(wanted)}
    other.load_state_dict(wanted, strict=False)
    assert all(torch.equal(t, expected[name]) for name, t in other.state_dict().items())


@pytest.mark.parametrize(("method", "options"), KINDS)
def test_a_base_without_its_affine_is_not_taken_for_one_that_has_none(method, options):
    model = Scaled()
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("norm.weight")}
    assert len(state) < len(model.state_dict())
    converted = normswap.convert(model, method, contexts=3, **options)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.weight"):
        converted.load_state_dict(state)


def test_a_state_of_cn_x_with_batch_statistics_is_not_taken_for_a_base():
    batch = normswap.convert(Scaled(), "cn-x", contexts=3, statistics="batch")
    learned = normswap.convert(Scaled(), "cn-x", contexts=3)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_mean"):
        learned.load_state_dict(batch.state_dict())
