"""Models converted without values, which a base's state dict gives them later."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import ConversionError
from tests.support.sampling import crossed


class Net(nn.Module):
    """One norm of a kind between layers of other kinds."""

    def __init__(self, kind=nn.BatchNorm2d, **settings):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = kind(4, **settings)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


NORMS = {
    "batch": (nn.BatchNorm2d, {}),
    "batch without affine": (nn.BatchNorm2d, {"affine": False}),
    "instance": (nn.InstanceNorm2d, {}),
    "instance with statistics": (nn.InstanceNorm2d, {"affine": True, "track_running_stats": True}),
}
CASES = [(m, n) for m in ("cn", "cn-x", "acn") for n in NORMS if m != "acn" or "instance" not in n]
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
PRIORS = [1.0, 2.0, 5.0]


def make_base(norm):
    torch.manual_seed(0)
    kind, settings = NORMS[norm]
    base = Net(kind, **settings)
    base.train()(3 * torch.randn(8, 3, 8, 8) + 1)
    for parameter in base.bn.parameters():
        parameter.data.add_(torch.rand_like(parameter))
    return base.eval()


def options(method):
    return {} if method == "acn" else {"contexts": 3, "priors": PRIORS}


def calls(method):
    return [{}] if method == "acn" else [{}, {"context": torch.arange(6) % 3}]


def start_empty(method, norm):
    kind, settings = NORMS[norm]
    with torch.device("meta"):
        model = Net(kind, **settings).eval()
    return normswap.convert(model, method, **options(method))


def emptied(model):
    """Give a model memory, with what nobody put there: NaN."""
    model.to_empty(device="cpu")
    return model


@pytest.fixture(autouse=True)
def memory_without_values_is_nan():
    with pytest.MonkeyPatch.context() as patch:
        empty_like = torch.empty_like

        def spoilt(*args, **kwargs):
            tensor = empty_like(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-7)

        patch.setattr(torch, "empty_like", spoilt)
        yield


def load(model, state):
    model.load_state_dict(state)
    return model


def assign(model, state):
    model.load_state_dict(state, assign=True)
    return model


WAYS = {
    "to_empty, load": lambda model, state: load(emptied(model), state),
    "to_empty, assign": lambda model, state: assign(emptied(model), state),
    "assign": assign,
    "to meta and back, load": lambda model, state: load(emptied(emptied(model).to("meta")), state),
}


@pytest.mark.parametrize(("case", "way"), crossed(CASES, WAYS))
def test_loading_the_base_gives_what_converting_it_gives(case, way):
    method, norm = case
    base = make_base(norm)
    model = WAYS[way](start_empty(method, norm), base.state_dict())
    reference = normswap.convert(base, method, **options(method))
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        torch.testing.assert_close(ours[name], tensor, msg=name)
    for given in calls(method):
        torch.testing.assert_close(model(IMAGES, **given), reference(IMAGES, **given))
        torch.testing.assert_close(model(IMAGES, **given), base(IMAGES))


@pytest.mark.parametrize(("method", "norm"), CASES)
def test_a_layer_that_gets_memory_alone_is_a_fresh_one(method, norm):
    layer = emptied(start_empty(method, norm)).bn
    assert all(bool(t.isfinite().all()) for t in layer.state_dict().values())
    if method != "acn":
        torch.testing.assert_close(layer.priors, torch.tensor(PRIORS) / 8)


def test_a_norm_at_the_input_that_is_loaded_as_the_identity_does_not_start_from_data():
    base = make_base("batch").double()  # in which the root of a variance of one is exact
    model = normswap.convert(base, "cn-x", contexts=2, placement="input")
    loaded = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    labels, x = [0, 1, 0, 1, 0, 1], IMAGES.double()
    assert torch.equal(loaded.train()(x, context=labels), model.train()(x, context=labels))
    assert torch.equal(loaded.input_norm.mu, model.input_norm.mu)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["selfnorm", "cnsn"])
def test_gates_that_get_memory_or_are_assigned_are_the_identity(method, way):
    with torch.device("meta"):
        model = normswap.convert(Net(), method, placement="norm").eval()
    base = make_base("batch")
    torch.testing.assert_close(WAYS[way](model, base.state_dict())(IMAGES), base(IMAGES))
    assert all(
        bool((p.detach() != 0).any()) for n, p in model.named_parameters() if "g.weight" in n
    )


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_back_to_norms_and_to_files(method, tmp_path):
    base = make_base("batch")
    model = WAYS["to_empty, load"](start_empty(method, "batch"), base.state_dict())
    torch.testing.assert_close(normswap.revert(model)(IMAGES), base(IMAGES))
    with pytest.raises(ConversionError, match="expected bn to have had values at conversion"):
        normswap.revert(model, discard=True)
    normswap.save(model, tmp_path)
    torch.testing.assert_close(normswap.load(base, tmp_path)(IMAGES), model(IMAGES))


def test_a_trained_layer_moved_to_meta_keeps_its_priors_and_no_more():
    base = make_base("batch")
    model = normswap.convert(base, "cn", **options("cn"))
    trained = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(trained)
    torch.testing.assert_close(model.bn.priors, torch.tensor(PRIORS) / 8)
    torch.testing.assert_close(model(IMAGES), base(IMAGES))


def test_uniform_priors_of_a_layer_made_on_the_meta_device():
    with torch.device("meta"):
        layer = normswap.ContextNorm(4, 3)
    assert layer.priors.is_meta
    torch.testing.assert_close(emptied(layer).priors, torch.full((3,), 1 / 3))


def test_a_context_cannot_be_added_without_values():
    with pytest.raises(ConversionError, match=r"without values \(meta device\)"):
        normswap.add_context(start_empty("cn", "batch"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", normswap.methods())
def test_a_model_without_values_runs_and_goes_back(method, training):
    needs = normswap.get_method(method).needs_context
    with torch.device("meta"):
        model = normswap.convert(Net(), method, **({"contexts": 3} if needs else {}))
    model.train(training)
    for labels in ([0, 1, 2], torch.tensor([0, 1, 2]), "1") if needs else (None,):
        given = {} if labels is None else {"context": labels}
        assert model(torch.empty(3, 3, 8, 8, device="meta"), **given).shape == (3, 2)
    assert type(normswap.revert(model).bn) is nn.BatchNorm2d
