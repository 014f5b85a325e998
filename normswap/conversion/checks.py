"""Models that cannot be converted as a whole, found before anything is changed."""

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from normswap.errors import ConversionError, expect_module
from normswap.graph.state import RECORD, context_argument
from normswap.sites import looks_like_norm
from normswap.util.changed_norms import is_quantised

_WRAPPERS = {
    "OptimizedModule": "is compiled; convert the original module (._orig_mod), then compile it",
    "FullyShardedDataParallel": "is sharded; convert first, then shard",
    "FSDPModule": "is sharded; convert first, then shard",
}
# What float models carry to be quantised later; they compute in float.
_STUBS = ("FloatFunctional", "QuantStub", "DeQuantStub")


def check_model(model: nn.Module) -> None:
    """Raise if a model, or a part of it, is of a kind that surgery cannot change.

    Raises:
        ConversionError: not a module; fake, lazy, scripted, compiled, traced, wrapped for
            distribution, dispatched by accelerate, prepared for quantisation, or converted already.
    """
    expect_module(model)
    if detect_fake_mode([*model.parameters(), *model.buffers()]) is not None:
        raise ConversionError(
            "cannot convert where tensors are fake (FakeTensorMode): convert outside of it, on the "
            "meta device where there is to be no memory, and run the converted model in it"
        )
    for name, module in model.named_modules():
        where = f"its submodule {name}" if name else "the model"
        why = _obstacle(module)
        if why is not None:
            raise ConversionError(f"cannot convert: {where} ({type(module).__name__}) {why}")


def _obstacle(module: nn.Module) -> str | None:
    # Of parts without norms nothing is changed, so they may be scripted, compiled or traced.
    opaque = isinstance(module, torch.jit.ScriptModule | fx.GraphModule)
    compiled = module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
    if (opaque or compiled) and not any(map(_may_normalise, module.modules())):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted; convert the Python module, then script or export it"
    if module._compiled_call_impl is not None:
        return "was compiled in place by .compile(); convert first, then compile"
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "is wrapped for parallel training; convert .module, then wrap it"
    # By name: importing torch._dynamo for its class would take seconds.
    kinds = {cls.__name__ for cls in type(module).__mro__}
    for wrapper, why in _WRAPPERS.items():
        if wrapper in kinds:
            return why
    if looks_like_norm(module) and "_hf_hook" in vars(module):
        remove = "accelerate.hooks.remove_hook_from_submodules(model)"
        return f"is dispatched by accelerate; convert first, then dispatch, or call {remove} before"
    if isinstance(module, fx.GraphModule):
        return "is a traced graph (fx.GraphModule); convert the module it was traced from"
    quantised = type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torchao."))
    if quantised and type(module).__name__ not in _STUBS:
        return "is prepared for quantisation; convert first, then prepare"
    if any(map(is_quantised, module.parameters(recurse=False))):
        return "is quantised; convert first, then quantise"
    if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
        return "is lazy: its shapes are unknown until a first forward; run one, then convert"
    if context_argument(module) is not None or RECORD in vars(module):
        return "is converted already; convert the original model with the method wanted"
    return None


def _may_normalise(module: nn.Module) -> bool:
    # A scripted module has the name of its class alone, and a graph may call the function.
    name = str(getattr(module, "original_name", ""))
    called = isinstance(module, fx.GraphModule) and any(
        "norm" in str(node.target) for node in module.graph.nodes
    )
    return looks_like_norm(module) or "Norm" in name or called
