from argparse import Namespace

import pytest
import timm
import torch
from torch import nn

import normswap
from recipes.common.augment import Augmentation
from recipes.common.data import DomainData, Loader
from recipes.common.errors import RecipeError
from recipes.common.options import of_cell
from recipes.common.scores import evaluate
from recipes.common.training import fill_statistics, make_arm, train_epoch

CONFIG = of_cell(Namespace(epochs=2, batch_size=8, lr=1e-3, seed=0))
CPU = torch.device("cpu")


def coloured(held_out: str | None = None) -> DomainData:
    """Four domains of two classes; red tells the class, green the domain; every third tests."""
    numbers = torch.arange(96)
    labels, domains = numbers % 2, (numbers // 2) % 4
    images = torch.zeros(96, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = (labels * 200).to(torch.uint8)[:, None, None]
    images[:, 1] = (domains * 60).to(torch.uint8)[:, None, None]
    test = (numbers // 8) % 3 == 0
    if held_out is not None:
        test = test | (domains == "abcd".index(held_out))
    return DomainData(
        images=images,
        labels=labels,
        domains=domains,
        train=~test,
        test=test,
        classes=["dark", "red"],
        domain_names=list("abcd"),
        augmentation=Augmentation((1.0, 1.0), 0.0, False),
        held_out=held_out,
    )


def make_loader(data: DomainData) -> Loader:
    return Loader(data, (0.0,) * 3, (1.0,) * 3, CONFIG.batch_size, CPU)


class Spy(nn.Module):
    """Tells the class by the red channel, wrongly in domain c; writes down every context."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, context=None):
        self.seen.append((self.training, x[:, 1, 0, 0] * 255 / 60, context))
        red = x[:, 0, 0, 0] - 0.3
        red = torch.where((x[:, 1, 0, 0] * 255 / 60).round() == 2, -red, red)
        return torch.stack([-red, red], 1) * self.scale


class Plain(nn.Module):
    """A small network with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


def test_training_gives_each_image_the_label_of_its_domain():
    spy = Spy()
    train_epoch([make_arm("spy", spy, CONFIG, 16)], make_loader(coloured()), CONFIG, 0)
    assert len(spy.seen) == 8
    for training, domains, context in spy.seen:
        assert training
        assert torch.equal(context, domains.round().long())


def test_labels_are_hidden_from_training_steps_by_the_seed():
    seen = []
    for seed in (0, 0, 1):
        spy, config = Spy(), Namespace(**{**vars(CONFIG), "drop_labels": 0.5, "seed": seed})
        train_epoch([make_arm("spy", spy, config, 8)], make_loader(coloured()), config, 0)
        contexts = torch.cat([context for _, _, context in spy.seen])
        domains = torch.cat([domains.round().long() for _, domains, _ in spy.seen])
        assert 16 < (contexts == -1).sum() < 48
        assert torch.equal(contexts, domains.where(contexts != -1, -1))
        seen.append(contexts)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_evaluation_gives_the_label_of_the_domain_or_none():
    spy = Spy()
    arm = make_arm("spy", spy, CONFIG, 16)
    evaluate(arm, make_loader(coloured()), CONFIG)
    contexts = [context for _, _, context in spy.seen]
    assert sum(context is None for context in contexts) == 4
    for training, domains, context in spy.seen:
        assert not training
        assert context is None or torch.equal(context, domains.round().long())


def test_the_held_out_domain_is_tested_with_its_label_unknown_only():
    spy = Spy()
    accuracy = evaluate(make_arm("spy", spy, CONFIG, 16), make_loader(coloured("b")), CONFIG)
    assert set(accuracy["unknown"]) == set("abcd")
    assert set(accuracy["known"]) == set("acd")
    for _, domains, context in spy.seen:
        if (domains.round() == 1).any():
            assert context is None


def test_accuracy_is_the_share_of_right_answers_by_domain():
    accuracy = evaluate(make_arm("spy", Spy(), CONFIG, 16), make_loader(coloured()), CONFIG)
    assert accuracy["known"] == {"a": 100.0, "b": 100.0, "c": 0.0, "d": 100.0}


def test_a_model_without_context_has_no_accuracy_for_known_labels():
    accuracy = evaluate(make_arm("bn", Plain(), CONFIG, 16), make_loader(coloured()), CONFIG)
    assert set(accuracy) == {"unknown"}


def test_norm_parameters_are_spared_weight_decay_and_convolutions_are_not():
    model = normswap.convert(timm.create_model("test_resnet"), method="cn-x", contexts=3)
    groups = make_arm("cn-x", model, CONFIG, 16).optimizer.param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    norms = [m for m in model.modules() if isinstance(m, normswap.ContextNormX)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert norms
    assert all(id(p) in spared for m in norms for p in m.parameters())
    assert all(id(m.weight) in decayed for m in convolutions)
    assert len(decayed) + len(spared) == len(list(model.parameters()))


def test_equal_models_trained_side_by_side_stay_equal():
    first, second = Plain(), Plain()
    second.load_state_dict(first.state_dict())
    arms = [make_arm(name, m, CONFIG, 16) for name, m in (("a", first), ("b", second))]
    start = first.conv.weight.clone()
    train_epoch(arms, make_loader(coloured()), CONFIG, 0)
    assert not torch.equal(first.conv.weight, start)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_an_arm_trains_the_same_alone_as_beside_another():
    torch.manual_seed(0)
    alone, beside, other = Plain(), Plain(), Plain()
    beside.load_state_dict(alone.state_dict())
    train_epoch([make_arm("a", alone, CONFIG, 16)], make_loader(coloured()), CONFIG, 0)
    arms = [make_arm("o", other, CONFIG, 16), make_arm("a", beside, CONFIG, 16)]
    train_epoch(arms, make_loader(coloured()), CONFIG, 0)
    assert torch.equal(alone.conv.weight, beside.conv.weight)


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_nothing():
    arm = make_arm("bn", Plain(), of_cell(CONFIG), 100)
    rates = []
    for update in range(100):
        arm.schedule.step_update(update)
        rates.append(arm.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 1e-5


def test_the_loss_falls_on_a_learnable_task():
    arm = make_arm("bn", Plain(), of_cell(CONFIG, epochs=8, lr=1e-2), 64)
    losses = [
        train_epoch([arm], make_loader(coloured()), CONFIG, epoch)["bn"]["loss"]
        for epoch in range(8)
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite_is_an_error():
    spy = Spy()
    spy.scale.data.fill_(torch.inf)
    with pytest.raises(
        RecipeError, match=r"the loss of spy is nan after step 1, .*; try a smaller"
    ):
        train_epoch([make_arm("spy", spy, CONFIG, 16)], make_loader(coloured()), CONFIG, 0)


def test_the_error_names_the_first_gradient_that_was_not_finite():
    model = Plain()
    calls = []

    def spoil(gradient):
        calls.append(gradient)
        return gradient * torch.nan if len(calls) == 3 else gradient

    model.conv.weight.register_hook(spoil)
    with pytest.raises(
        RecipeError, match=r"after step 3, where the gradient of conv\.weight was not"
    ):
        train_epoch([make_arm("bn", model, CONFIG, 16)], make_loader(coloured()), CONFIG, 0)


def test_statistics_are_filled_with_the_average_of_the_first_batches():
    loader = make_loader(coloured())
    norm = nn.BatchNorm2d(3)
    fill_statistics(norm, loader, 0, batches=4)
    batches = [b.images for b, _ in zip(loader.train_epoch(0, -1), range(4), strict=False)]
    means = torch.stack([images.mean((0, 2, 3)) for images in batches])
    variances = torch.stack([images.transpose(0, 1).flatten(1).var(1) for images in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    assert norm.momentum == 0.1
