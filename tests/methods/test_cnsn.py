import copy
import io

import pytest
import timm
import torch

import normswap
from normswap.methods.cnsn import CNSN
from normswap.methods.crossnorm import CrossNorm
from normswap.methods.selfnorm import SelfNorm


def test_cnsn_is_crossnorm_then_selfnorm():
    crossnorm, selfnorm = CrossNorm(), SelfNorm(3, init="paper")
    layer = CNSN(crossnorm, selfnorm)
    x = torch.randn(4, 3, 5, 5)
    torch.manual_seed(1)
    y = layer(x, True)
    torch.manual_seed(1)
    rewritten = copy.deepcopy(crossnorm)(x, True)
    twin = SelfNorm(3, init="paper")
    twin.g.weight.data.copy_(selfnorm.g.weight)
    assert torch.equal(y, twin(rewritten))
    assert torch.equal(layer(x, False), twin(x))
    layer.eval()
    assert torch.equal(layer(x, True), selfnorm(x))
    assert set(layer.state_dict()) == {f"selfnorm.{key}" for key in selfnorm.state_dict()}


def test_cnsn_starts_as_the_identity_and_saves():
    layer = CNSN(CrossNorm(), SelfNorm(3))
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(layer(x, False), x)
    assert torch.equal(layer.eval()(x), x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    CNSN(CrossNorm(), SelfNorm(3)).load_state_dict(torch.load(file))


@pytest.mark.parametrize(
    ("at", "said"), [("post", "'post' for both"), ("end", "unknown placement 'end'")]
)
def test_a_placement_of_crossnorm_that_is_none_of_its_own_is_refused(at, said):
    with pytest.raises(normswap.ConversionError, match=said):
        normswap.plan(timm.create_model("resnet10t"), "cnsn", placement="post", crossnorm_at=at)


def test_crossnorm_and_selfnorm_at_two_places_of_a_block_keep_the_function():
    model = timm.create_model("resnet10t").eval()
    x = torch.randn(4, 3, 64, 64)
    y = model(x)
    converted = normswap.convert(
        model, "cnsn", placement="residual", crossnorm_at="post", p=1.0, active=4
    )
    assert converted(x).equal(y)
    converted.train()
    torch.manual_seed(0)
    fired = converted(x)
    torch.manual_seed(0)
    assert not fired.equal(model.train()(x))
    kinds = {type(m).__name__ for m in converted.layer1[0].modules()}
    assert kinds >= {"SelfNorm", "CrossNorm"}
