"""What the host draws is not recorded into a CUDA graph, which would repeat it."""

import pytest
import torch

import normswap
from normswap.errors import InputError


@pytest.fixture(autouse=True)
def _capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_layer_that_draws_whether_it_fires_is_refused():
    layer, x = normswap.CrossNorm(p=0.5), torch.randn(4, 3, 5, 5)
    with pytest.raises(
        InputError, match=r"CrossNorm fires to be drawn anew .* eval mode or with p=0"
    ):
        layer(x)
    assert layer.eval()(x) is x


def test_so_is_the_schedule_of_a_model():
    schedule = normswap.Schedule(0.5, 1, 2)
    for draw in (schedule.begin, lambda: schedule.fires(0)):
        with pytest.raises(InputError, match="which CrossNorm layers fire to be drawn anew"):
            draw()


def test_what_is_certain_is_not_drawn():
    x = torch.randn(4, 3, 5, 5)
    assert normswap.CrossNorm(p=0)(x) is x
    assert normswap.CrossNorm(p=1)(x) is not x
    schedule = normswap.Schedule(0, 1, 2)
    schedule.begin()
    assert not schedule.fires(0)
