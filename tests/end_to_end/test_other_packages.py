"""What users do to a converted model with other packages: each equals what it does without them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import normswap
from tests.support.models import ConvNet

IMAGES = torch.randn(5, *ConvNet.shape, generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([0, 1, 1, -1, 0])
# Of the packages, which are not pinned.
pytestmark = pytest.mark.filterwarnings("ignore")


def separate(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNorm):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def make(base=None):
    torch.manual_seed(0)
    base = ConvNet().eval() if base is None else base
    return base, separate(normswap.convert(base, "cn", contexts=["a", "b"], verify=False))


def norm_name(model):
    return next(n for n, m in model.named_modules() if isinstance(m, normswap.ContextNorm))


@torch.no_grad()
def outputs(model, **given):
    return model(IMAGES, **(given or {"context": LABELS}))


def test_pruned_convolutions_are_specialised_and_saved_once_pruning_is_removed(tmp_path):
    base, model = make()
    convs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    prune.global_unstructured(convs, prune.L1Unstructured, amount=0.3)
    expected = outputs(model)
    for module, name in convs:
        prune.remove(module, name)
    torch.testing.assert_close(outputs(model), expected)
    normswap.save(model, tmp_path)
    torch.testing.assert_close(outputs(normswap.load(base, tmp_path).eval()), expected)
    plain = normswap.specialize(model, "b")
    torch.testing.assert_close(plain(IMAGES), outputs(model, context="b"))


@pytest.mark.parametrize("use", ["specialize", "revert", "save"])
def test_a_pruned_norm_is_refused_until_pruning_is_removed(use, tmp_path):
    _, model = make()
    name = norm_name(model)
    layer = model.get_submodule(name)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    expected = outputs(model, context="a")
    with pytest.raises(normswap.ConversionError, match=rf"{name}\.weight .*prune\.remove"):
        getattr(normswap, use)(model, tmp_path if use == "save" else "a")
    prune.remove(layer, "weight")
    torch.testing.assert_close(normswap.specialize(model, "a")(IMAGES), expected)


def test_offloaded_by_accelerate_a_model_computes_the_same():
    accelerate = pytest.importorskip("accelerate")
    _, model = make()
    expected = outputs(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    torch.testing.assert_close(outputs(offloaded), expected, rtol=0, atol=0)
    with normswap.use_context(offloaded, LABELS), torch.no_grad():
        torch.testing.assert_close(offloaded(IMAGES), expected, rtol=0, atol=0)


def test_a_model_dispatched_by_accelerate_is_refused_with_the_way_out():
    accelerate = pytest.importorskip("accelerate")
    base = accelerate.cpu_offload(ConvNet().eval(), torch.device("cpu"))
    with pytest.raises(normswap.ConversionError, match="dispatched by accelerate; convert first"):
        normswap.convert(base, "cn", contexts=2)


def test_torchao_quantises_a_specialised_model_as_the_original(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    base, model = make()
    plain = normswap.specialize(model, "a")
    expected = plain(IMAGES).detach()
    quantization.quantize_(plain, config)
    torch.testing.assert_close(plain(IMAGES), expected, rtol=0.05, atol=0.05)
    quantization.quantize_(model, config)
    torch.testing.assert_close(outputs(model, context="a"), plain(IMAGES).detach())
    with pytest.raises(normswap.CheckpointError, match="is quantised; save the model before"):
        normswap.save(model, tmp_path)
    quantization.quantize_(base, config)
    with pytest.raises(normswap.ConversionError, match="is quantised; convert first"):
        normswap.convert(base, "cn", contexts=2)


def test_quantised_after_training_a_specialised_model_stays_near():
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    _, model = make()
    plain = normswap.specialize(model, "a")
    expected = plain(IMAGES).detach()
    prepared = fx.prepare_fx(plain, get_default_qconfig_mapping(), (IMAGES,))
    prepared(IMAGES)
    found = fx.convert_fx(prepared)(IMAGES).detach()
    assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_a_specialised_model_is_traced_and_frozen():
    _, model = make()
    plain = normswap.specialize(model, "b")
    frozen = torch.jit.freeze(torch.jit.trace(plain, IMAGES[:2]))
    torch.testing.assert_close(frozen(IMAGES), outputs(model, context="b"), rtol=1e-4, atol=1e-5)


def convolutions(base):
    return [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]


def lora(peft, base):
    return peft.LoraConfig(r=2, target_modules=convolutions(base), init_lora_weights=False)


def test_lora_on_a_converted_model_merges_saves_and_loads(tmp_path):
    peft = pytest.importorskip("peft")
    base, model = make()
    adapted = peft.get_peft_model(copy.deepcopy(model), lora(peft, base)).eval()
    expected = outputs(adapted)
    assert not expected.allclose(outputs(model))
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(again), expected)
    merged = adapted.merge_and_unload()
    normswap.save(merged, tmp_path / "norms")
    loaded = normswap.load(base, tmp_path / "norms").eval()
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-4, atol=1e-5)


def test_freeze_lets_the_norms_learn_that_lora_froze():
    peft = pytest.importorskip("peft")
    base, model = make()
    adapted = peft.get_peft_model(model, lora(peft, base))
    normswap.freeze(adapted, "norms", also="*lora_*")
    learning = {name.split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    norms = [
        p for m in adapted.modules() if isinstance(m, normswap.ContextNorm) for p in m.parameters()
    ]
    assert all(p.requires_grad for p in norms)
    assert learning == {"weight", "bias"}
    assert any(p.requires_grad for n, p in adapted.named_parameters() if "lora_A" in n)


def test_a_converted_lora_model_is_specialised_before_it_is_merged():
    peft = pytest.importorskip("peft")
    base = ConvNet().eval()
    with pytest.warns(normswap.errors.AdviceWarning, match="frozen, and so are the layers"):
        model = separate(
            normswap.convert(peft.get_peft_model(base, lora(peft, base)), "cn", contexts=["a", "b"])
        )
    expected = outputs(model.eval(), context="b")
    merged = normswap.specialize(model, "b").merge_and_unload()
    torch.testing.assert_close(merged(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(normswap.ConversionError, match=r"part of one: .*merge_and_unload"):
        normswap.specialize(model.merge_and_unload(), "b")


def test_a_saved_conversion_beside_pretrained_files_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = transformers.ResNetConfig(num_channels=3, layer_type="basic", num_labels=4, **sizes)
    base, model = make(transformers.ResNetForImageClassification(config).eval())
    base.save_pretrained(tmp_path)
    normswap.save(model, tmp_path)
    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path)
    loaded = normswap.load(again, tmp_path).eval()
    torch.testing.assert_close(outputs(loaded).logits, outputs(model).logits, rtol=0, atol=0)
    normswap.specialize(model, "a").save_pretrained(tmp_path / "a")
    plain = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(plain(IMAGES).logits, outputs(model, context="a").logits)


def test_frozen_batch_norms_of_a_detr_say_that_they_learn_nothing():
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    backbone = transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage2"])
    layers = {
        f"{part}_{what}": 1
        for part in ("encoder", "decoder")
        for what in ("layers", "attention_heads")
    }
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    config = transformers.DetrConfig(
        backbone_config=backbone, d_model=8, num_queries=3, **own, **layers
    )
    base = transformers.DetrForObjectDetection(config).eval()
    with pytest.warns(normswap.errors.AdviceWarning, match="frozen, and so are the layers"):
        model = normswap.convert(base, "cn", contexts=2, verify=False)
    images = torch.rand(2, 3, 32, 32)
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(model(images, context=labels).logits, base(images).logits)
    normswap.freeze(model, "norms", stats="frozen")
    model(images, context=labels).logits.sum().backward()
    norms = [m for m in model.modules() if isinstance(m, normswap.ContextNorm)]
    assert norms
    assert all(norm.bias.grad.ne(0).any(1).all() for norm in norms)


@pytest.mark.parametrize("batch", [16, 20])
def test_ghost_batch_norm_of_tabnet_takes_the_labels_of_its_chunks(batch):
    tab_network = pytest.importorskip("pytorch_tabnet.tab_network")
    ghost = nn.Sequential(tab_network.GBN(4, virtual_batch_size=8))
    model = normswap.convert(ghost.double(), "cn", contexts=2, verify=False).train()
    x = torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(batch) % 2
    expected = torch.empty_like(x)
    for rows in torch.arange(batch).chunk(-(-batch // 8)):
        for context in range(2):
            own = rows[labels[rows] == context]
            centred = x[own] - x[own].mean(0)
            # An affine that starts at sqrt(1/2), over priors of one half each.
            expected[own] = centred / (centred.square().mean(0) + 1e-5).sqrt()
    torch.testing.assert_close(model(x, context=labels), expected)
