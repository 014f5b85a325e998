import copy
import io

import torch

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
