"""In a CUDA graph draws are made on the device: replays would repeat what the host draws."""

import pytest
import torch

import normswap
from normswap.errors import InputError
from normswap.functional import schedule
from normswap.functional.draws import draw_beta
from normswap.util.batches import Reservoir


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(schedule, "CAPTURES", "cpu")


def test_a_layer_draws_on_the_device_whether_it_fires(capturing):
    layer, x = normswap.CrossNorm(p=0.5), torch.randn(4, 3, 5, 5)
    assert isinstance(layer._draw_fire(x), torch.Tensor)
    changed = [not torch.equal(layer(x), x) for _ in range(20)]
    assert any(changed)
    assert not all(changed)
    assert layer.eval()(x) is x


def test_so_does_a_model_and_keeps_nothing_of_the_graph(capturing):
    drawn = normswap.Schedule(1.0, 1, 3)
    drawn.begin()
    answers = [drawn.fires(site) for site in range(3)]
    assert all(isinstance(answer, torch.Tensor) for answer in answers)
    assert sum(map(int, answers)) == 1
    assert not drawn._answers


def test_a_part_without_its_root_is_refused(capturing):
    with pytest.raises(InputError, match="which CrossNorm layers fire to be drawn anew"):
        normswap.Schedule(0.5, 1, 2).fires(0)


def test_so_is_one_that_the_host_drew_for_before(monkeypatch, request):
    drawn = normswap.Schedule(1.0, 1, 1)
    drawn.begin()
    request.getfixturevalue("capturing")
    with pytest.raises(InputError, match="which CrossNorm layers fire to be drawn anew"):
        drawn.fires(0)


def test_what_is_certain_is_not_drawn(capturing):
    x = torch.randn(4, 3, 5, 5)
    assert normswap.CrossNorm(p=0)(x) is x
    assert normswap.CrossNorm(p=1)(x) is not x
    drawn = normswap.Schedule(0, 1, 2)
    drawn.begin()
    assert not drawn.fires(0)


def test_compiled_code_does_not_ask_for_the_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    layer, x = normswap.CrossNorm(p=0.5), torch.randn(4, 3, 5, 5)
    drawn = normswap.Schedule(1.0, 1, 1)

    def forward(x):
        drawn.begin(x.device)
        return torch.where(drawn.fires(0, x.device), layer(x), x)

    run = torch.compile(forward, backend="eager", fullgraph=True)
    assert run(x).shape == x.shape


def reservoir(generator):
    kept = Reservoir(9, generator)
    kept.add(5000, lambda index: index)
    return kept.keys


DRAWS = {
    "uniform": lambda generator: draw_beta(1.0, 9, generator=generator),
    "beta": lambda generator: draw_beta(0.1, 9, generator=generator),
    "reservoir": reservoir,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_the_same_whatever_the_default_dtype(name, dtype):
    expected = DRAWS[name](torch.Generator().manual_seed(0))
    torch.set_default_dtype(dtype)
    try:
        found = DRAWS[name](torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
