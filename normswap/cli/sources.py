"""Where a model of the command line comes from: timm, torchvision, transformers, a function."""

import argparse
import importlib
import inspect
import os
import pkgutil
import sys
from typing import Any

import torch
from torch import nn

from normswap.errors import NormswapError, UnknownNameError
from normswap.util.arguments import check_callable, describe, unknown_name
from normswap.util.extras import need

FORMS = (
    "timm:NAME, torchvision:NAME, transformers:NAME (or a folder with a config.json), or "
    "package.module:function, which returns a model"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model: a name of timm's, or a source."""
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("model", nargs="?", help="name of a timm model")
    given.add_argument("--source", help=FORMS)


def chosen_model(options: argparse.Namespace, device: str) -> nn.Module:
    """Build the model that the arguments of `add_model` say; see `build_model`."""
    return build_model(options.source or f"timm:{options.model}", device)


def build_model(source: str, device: str) -> nn.Module:
    """Build a model, in eval mode.

    Args:
        source: one of `FORMS`. Models of libraries have no weights; of transformers the
            configuration alone is read, and code that a repository brings is not run. A function
            is called without arguments, and looked for in the working directory too.
        device: where libraries build; a function builds where it does.

    Raises:
        NormswapError: a source of no such form, a library that is not installed, a configuration
            that cannot be read, or a function that is not there or returns no model.
        UnknownNameError: a library has no such model; the message lists near names.
    """
    kind, colon, name = source.partition(":")
    if not (kind and colon and name):
        raise NormswapError(f"expected --source as {FORMS}, got {source!r}")
    build = _LIBRARIES.get(kind)
    if build is None:
        return _call(source).eval()
    with torch.device(device):
        return build(name).eval()


def _timm(name: str) -> nn.Module:
    timm = need("timm", "recipes", "looking up a model by its name")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:8] or timm.list_models(f"{name[:5]}*")[:8]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UnknownNameError(f"timm has no model {name!r}{hint}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _torchvision(name: str) -> nn.Module:
    zoo: Any = need("torchvision.models", "recipes", "a model of torchvision")
    if name not in zoo.list_models():
        raise unknown_name("model of torchvision", name, zoo.list_models())
    takes = inspect.signature(zoo.get_model_builder(name)).parameters
    # Left out, some builders fetch the weights of a backbone.
    without = {key: None for key in ("weights", "weights_backbone") if key in takes}
    model: nn.Module = zoo.get_model(name, **without)
    return model


def _transformers(name: str) -> nn.Module:
    library: Any = need("transformers", "transformers", "a model of transformers")
    try:
        config = library.AutoConfig.from_pretrained(name, trust_remote_code=False)
        # The class that the weights are of has a head, which may have norms.
        named = getattr(library, (config.architectures or [""])[0], None)
        if isinstance(named, type) and issubclass(named, nn.Module):
            return named(config)
        model: nn.Module = library.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a configuration that is not ours makes go wrong
        said = " ".join(str(error).split())
        raise NormswapError(f"cannot read a configuration from {name!r}: {said}") from error
    return model


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


def _call(source: str) -> nn.Module:
    if os.getcwd() not in sys.path:  # a console script does not look there
        sys.path.insert(0, os.getcwd())
    module = source.partition(":")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        # What the module itself imports and does not find is a fault of its own.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise NormswapError(f"expected --source as {FORMS}, got {source!r}: {error}") from error
    try:
        function: Any = pkgutil.resolve_name(source)
    except (AttributeError, ValueError) as error:
        raise NormswapError(f"expected --source as {FORMS}, got {source!r}: {error}") from error
    check_callable(f"the function of --source {source}", function, "function()", 0)
    model = function()
    if not isinstance(model, nn.Module):
        raise NormswapError(f"expected {source} to return a model, got {describe(model)}")
    return model
