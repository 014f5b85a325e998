import math

import pytest
import timm.loss
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from recipes.common import losses
from recipes.common.data import Batch

QUICK = ["finetune", "--smoke", "--model", "test_resnet", "--image-size", "16"]


def naive_jsd(logits: list[torch.Tensor]) -> torch.Tensor:
    """Loop over samples, versions and classes, from the formula."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in zip(*logits, strict=True):
        p = [row.double().softmax(0) for row in sample]
        for row in p:
            for k in range(len(row)):
                mixture = (sum(q[k] for q in p) / len(p)).clamp(1e-7, 1)
                if row[k] > 0:
                    total = total + row[k] * (row[k].log() - mixture.log())
    return total / len(logits) / len(logits[0])


def naive_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows = zip(logits, labels, strict=True)
    return sum(-row.softmax(0)[label].log() for row, label in rows) / len(labels)


def draw_logits(scale: float = 3.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(5, 4, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(3)
    ]


def grads(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, inputs))


# A scale of 12 has mixtures below the clamp.
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
def test_jsd_is_the_loop_in_value_and_gradient(scale):
    logits = draw_logits(scale)
    torch.testing.assert_close(losses.jsd(logits), naive_jsd(logits), rtol=1e-12, atol=1e-14)
    for ours, loop in zip(
        grads(losses.jsd(logits), logits), grads(naive_jsd(logits), logits), strict=True
    ):
        torch.testing.assert_close(ours, loop, rtol=1e-9, atol=1e-14)


def test_jsd_and_cross_entropy_are_timms_loss():
    logits, labels = draw_logits(), torch.tensor([0, 3, 1, 2, 2])
    timms = timm.loss.JsdCrossEntropy(num_splits=3, alpha=10, smoothing=0)
    ours = F.cross_entropy(logits[0], labels) + 10 * losses.jsd(logits)
    theirs = timms(torch.cat(logits), labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(grads(ours, logits), grads(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_jsd_of_equal_predictions_is_nought_and_of_disjoint_ones_log_3():
    one = torch.randn(4, 3)
    assert losses.jsd([one, one, one]).abs() < 1e-6
    apart = list(50 * torch.eye(3)[:, None])
    torch.testing.assert_close(losses.jsd(apart).item(), math.log(3), rtol=1e-5, atol=0)


def test_jsd_has_a_finite_gradient_where_probabilities_underflow():
    logits = [torch.tensor([row], requires_grad=True) for row in ([0.0, 150.0], [200.0, 0.0])]
    assert losses.jsd(logits).isfinite()
    assert all(g.isfinite().all() for g in grads(losses.jsd(logits), logits))


def test_jsd_of_bfloat16_logits_is_computed_in_float32():
    assert losses.jsd([torch.randn(2, 3).bfloat16() for _ in range(3)]).dtype == torch.float32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3))


def converted(p: float) -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(Net().double(), method="cnsn", placement="norm", p=p)


def batch(mixed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    return Batch(images[0], labels, torch.zeros(6, dtype=torch.int64), tuple(images[1 : 1 + mixed]))


class Watch:
    """Stands between loss and model: notes images, modes, p and logits of every forward."""

    def __init__(self, model: nn.Module, fail_at: int | None = None) -> None:
        self.model = model
        self.fail_at = fail_at
        self.notes = []
        self.logits = []

    def __call__(self, images, context):
        (layer,) = losses.crossnorm_layers(self.model)
        norms = [m.training for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.notes.append((len(images), layer.training, layer.schedule.p, all(norms)))
        if len(self.notes) == self.fail_at:
            raise ValueError("no")
        self.logits.append(self.model(images))
        return self.logits[-1]


@pytest.mark.parametrize(
    ("loss", "p", "rows", "crossnorm_on"),
    [
        ("ce", 0.5, [6], [True]),
        ("augmix", 0.5, [18], [True]),
        ("jsd", 0.0, [6], [False]),
        ("jsd", 1.0, [6, 6, 6], [False, True, True]),
        ("augmix+jsd", 0.0, [18], [False]),
        ("augmix+jsd", 1.0, [18, 6, 6], [False, True, True]),
    ],
)
def test_which_forwards_a_loss_makes(loss, p, rows, crossnorm_on):
    watch = Watch(converted(p).train())
    losses.training_loss(loss, watch.model, watch, batch(mixed=2))
    expected = [(n, on, p, True) for n, on in zip(rows, crossnorm_on, strict=True)]
    assert watch.notes == expected


@pytest.mark.parametrize("loss", ["jsd", "augmix+jsd"])
def test_the_loss_is_that_of_the_loops_in_value_and_gradient(loss):
    data = batch(mixed=2 if loss == "augmix+jsd" else 0)
    watch = Watch(converted(1.0).train())
    value = losses.training_loss(loss, watch.model, watch, data)
    first, *crossed = watch.logits
    clean, *mixed = first.split(6)
    expected = naive_cross_entropy(clean, data.labels) + 10 * naive_jsd([clean, *crossed])
    if mixed:
        expected = expected + 12 * naive_jsd([clean, *mixed])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    weights = list(watch.model.parameters())
    ours = torch.autograd.grad(value, weights, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13)


def test_the_clean_pass_is_without_crossnorm_and_the_others_with_it():
    model = converted(1.0).train()
    bare = converted(0.0).train()
    bare.load_state_dict(model.state_dict())
    watch = Watch(model)
    losses.training_loss("jsd", model, watch, batch())
    without = bare(batch().images)
    assert torch.equal(watch.logits[0], without)
    first, second = watch.logits[1:]
    assert not torch.allclose(first, without)
    assert not torch.allclose(first, second)


def test_consistency_is_as_frequent_as_the_schedule_fires():
    watch = Watch(converted(0.25).train())
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(400):
            losses.training_loss("jsd", watch.model, watch, batch())
    crossed = (len(watch.notes) - 400) / 2
    assert abs(crossed - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_modes_and_probability_come_back_if_the_model_raises(fail_at):
    model = converted(0.5).train()
    (layer,) = losses.crossnorm_layers(model)
    layer.schedule.p = 0.999999
    watch = Watch(model, fail_at)
    with pytest.raises(ValueError, match="no"):
        losses.training_loss("jsd", model, watch, batch())
    assert len(watch.notes) == fail_at
    assert layer.schedule.p == 0.999999
    assert all(module.training for module in model.modules())


def test_a_layer_without_a_schedule_holds_its_own_probability():
    layers = [normswap.CrossNorm(p=0.2), normswap.CrossNorm(p=0.3).eval()]
    with losses.firing(layers), losses.switched_off(layers):
        assert [(layer.p, layer.training) for layer in layers] == [(1.0, False)] * 2
    assert [(layer.p, layer.training) for layer in layers] == [(0.2, True), (0.3, False)]


def test_a_model_without_crossnorm_keeps_what_has_a_meaning_for_it():
    left = {loss: losses.loss_of(nn.BatchNorm2d(3), loss) for loss in losses.LOSSES}
    assert left == {"ce": "ce", "jsd": "ce", "augmix": "augmix", "augmix+jsd": "augmix"}
    assert all(losses.loss_of(converted(0.5), loss) == loss for loss in losses.LOSSES)
