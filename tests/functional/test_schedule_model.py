import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normswap.errors import NormswapError
from normswap.functional.schedule import Schedule
from normswap.methods.crossnorm import CrossNorm


class Site(nn.Module):
    def __init__(self, schedule, index):
        super().__init__()
        self.schedule, self.index = schedule, index
        self.crossnorm = CrossNorm()
        self.seen = []

    def forward(self, x):
        fire = self.schedule.fires(self.index, x.device)
        if not torch.compiler.is_compiling():
            self.seen.append(fire)
        return self.crossnorm(x, fire)


class Model(nn.Module):
    """A model with a site after each layer, whose root begins and ends the draw."""

    def __init__(self, p, active, num_sites, checkpointed=False):
        super().__init__()
        self.schedule = Schedule(p, active, num_sites)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(num_sites))
        self.sites = nn.ModuleList(Site(self.schedule, i) for i in range(num_sites))
        self.checkpointed = checkpointed

    def block(self, index, x):
        x = self.layers[index](x.transpose(1, 2)).transpose(1, 2)
        return nn.functional.dropout(self.sites[index](x), 0.2)

    def forward(self, x):
        self.schedule.begin(x.device)
        for index in range(len(self.sites)):
            if self.checkpointed:
                x = checkpoint(self.block, index, x, use_reentrant=False)
            else:
                x = self.block(index, x)
        self.schedule.end()
        return x


def test_a_model_fires_where_the_schedule_says():
    torch.manual_seed(0)
    model, x = Model(1.0, 2, 5), torch.randn(4, 2, 3)
    for _ in range(30):
        model(x)
    rows = list(zip(*(site.seen for site in model.sites), strict=True))
    assert {sum(row) for row in rows} == {2}
    assert len(set(rows)) > 5


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_compiles_whole_in_training(checkpointed):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = Model(0.5, 1, 2, checkpointed), torch.randn(4, 2, 3)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        run(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(p.grad.isfinite().all() for p in model.parameters())


def gradients(model, x, forwards, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    sum(model(x).square().sum() for _ in range(forwards)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("forwards", [1, 3])
def test_checkpointing_recomputes_with_the_same_draw(forwards):
    model, x = Model(1.0, 2, 4), torch.randn(4, 2, 3)
    for seed in range(8):
        model.checkpointed = False
        expected = gradients(model, x, forwards, seed)
        model.checkpointed = True
        torch.testing.assert_close(gradients(model, x, forwards, seed), expected, rtol=0, atol=0)


def test_checkpointing_a_whole_model_or_a_part_of_it():
    model, x = Model(1.0, 1, 3), torch.randn(4, 2, 3)
    parts = [model, lambda t: model.block(1, model.block(0, t))]
    for part, seed in itertools.product(parts, range(8)):
        results = []
        for run in (part, lambda t, part=part: checkpoint(part, t, use_reentrant=False)):
            torch.manual_seed(seed)
            model.schedule.end()
            model.zero_grad()
            run(x).square().sum().backward()
            results.append([p.grad.clone() for p in model.layers[:2].parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_that_reenters_recomputes_with_the_same_draw():
    model, x = Model(1.0, 1, 3), torch.randn(4, 2, 3, requires_grad=True)
    run = lambda t: checkpoint(model.block, 0, t, use_reentrant=True)  # noqa: E731
    for seed in range(8):
        results = []
        for part in (lambda t: model.block(0, t), run):
            torch.manual_seed(seed)
            model.schedule.end()
            x.grad = None
            part(x).square().sum().backward()
            results.append(x.grad)
        assert torch.equal(*results)


def test_a_recomputation_leaves_no_draw_behind():
    schedule, forwards = Schedule(1.0, 8, 64), []

    def part(x):
        schedule.begin()
        forwards.append([schedule.fires(site) for site in range(64)])
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(part, x, use_reentrant=False).sum().backward()
    first, again = forwards
    assert first == again
    assert [schedule.fires(site) for site in range(64)] != first


def test_a_recomputation_that_is_not_known_is_an_error():
    model, x = Model(1.0, 1, 2), torch.randn(4, 2, 3)
    y = checkpoint(model.block, 0, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(NormswapError, match="leave preserve_rng_state on"):
        y.sum().backward()


def test_copies_and_pickles_keep_sharing_and_start_without_a_draw():
    model = Model(0.5, 1, 3)
    model(torch.randn(4, 2, 3))
    model.schedule.begin()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.schedule is not model.schedule
        assert all(site.schedule is twin.schedule for site in twin.sites)
        assert (
            repr(twin.schedule) == repr(model.schedule) == "Schedule(p=0.5, active=1, num_sites=3)"
        )
        assert twin.schedule._draw.fired is None
        twin(torch.randn(4, 2, 3))


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_for_it():
    model, x = Model(0.5, 1, 3).cuda(), torch.randn(4, 2, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(x).sum().backward()
