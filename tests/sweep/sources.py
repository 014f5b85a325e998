"""Where models come from: timm's registry, torchvision's, or a function of the user's."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.errors import RecipeError

Make = Callable[[Sequence[int], torch.dtype], Any]
SIZES = (64, 96, 128, 160, 224, 256)
KINDS = ("classification", "segmentation", "detection", "video", "optical_flow")


@dataclass(frozen=True)
class Attempt:
    """One way to build and feed a model; the first that runs is used.

    Attributes:
        label: what it is, for the report.
        options: keyword arguments of the builder.
        make: gives the inputs of the numbered samples, batch first, in a dtype.
    """

    label: str
    options: dict[str, Any]
    make: Make


@dataclass
class Candidate:
    """A model that could be swept.

    Attributes:
        name, family: of the model.
        build: gives the model, of random weights; takes an attempt's options.
        attempts: ways to feed it, cheapest first.
    """

    name: str
    family: str
    build: Callable[..., nn.Module]
    attempts: list[Attempt] = field(default_factory=list)


def numbered(row: int, *shape: int) -> Tensor:
    """Give the noise that belongs to a sample number, whatever batch it is in."""
    generator = torch.Generator().manual_seed(row)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def images(*shape: int) -> Make:
    """Give batches of one tensor."""
    return lambda rows, dtype: torch.stack([numbered(r, *shape) for r in rows]).to(dtype)


def given_rows(example: Any) -> Make:
    """Give batches out of example inputs: rows of every tensor, or entries of a list."""

    def pick(value: Any, rows: Sequence[int], dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor) and value.dim():
            taken = value[[r % value.shape[0] for r in rows]]
            return taken.to(dtype) if taken.is_floating_point() else taken
        if isinstance(value, dict):
            return {key: pick(part, rows, dtype) for key, part in value.items()}
        if isinstance(value, tuple):
            return tuple(pick(part, rows, dtype) for part in value)
        return value

    return lambda rows, dtype: pick(example, rows, dtype)


def names_of(source: str) -> list[str]:
    """List the models of a source.

    Raises:
        RecipeError: no such source.
    """
    if source == "timm":
        import timm

        return timm.list_models()
    if source == "torchvision":
        return sorted(_torchvision())
    return list(_custom(source))


def candidate(source: str, name: str) -> Candidate:
    """Give one model of a source, by name."""
    if source == "timm":
        return _timm(name)
    if source == "torchvision":
        return _from_torchvision(name, _torchvision()[name])
    return _custom(source)[name]


def choose(names: list[str], keep: list[str], drop: list[str]) -> list[str]:
    """Keep the names that match one of the first globs (all, without any) and none of the others.

    Raises:
        RecipeError: a glob that matches nothing, or nothing left.
    """
    for glob in (*keep, *drop):
        if not fnmatch.filter(names, glob):
            raise RecipeError(f"expected --filter and --exclude to match a model, got {glob!r}")
    chosen = [n for n in names if not keep or any(fnmatch.fnmatch(n, g) for g in keep)]
    chosen = [n for n in chosen if not any(fnmatch.fnmatch(n, g) for g in drop)]
    if not chosen:
        raise RecipeError("expected at least one model, got none; loosen --filter and --exclude")
    return chosen


def families() -> dict[str, list[str]]:
    """Give timm's models by family, which is the module that defines them."""
    import timm

    return {
        m: timm.list_models(module=m) for m in timm.list_modules() if timm.list_models(module=m)
    }


def _timm(name: str) -> Candidate:
    import timm
    from timm.models import get_pretrained_cfg

    entry = timm.model_entrypoint(name)
    config = get_pretrained_cfg(name, allow_unregistered=True)
    channels, *default = config.input_size if config is not None else (3, 224, 224)
    sizes = [(s, s) for s in SIZES if s < default[0]] + [tuple(default)]
    plain = [Attempt(f"{h} px", {}, images(channels, h, w)) for h, w in sizes]
    resized = []
    if config is not None and config.fixed_input_size:
        resized = [
            Attempt(f"img_size={h}", {"img_size": h}, images(channels, h, w)) for h, w in sizes
        ]
    family = entry.__module__.rpartition(".")[2]
    return Candidate(
        name,
        family,
        lambda **options: timm.create_model(name, pretrained=False, **options),
        [*resized, *plain],
    )


# Options that make models smaller whose size is not that of repeated blocks: same code and norms.
_NARROW: dict[str, dict[str, Any]] = {
    "halonet_h1": {"self_attn_kwargs": {"block_size": 4, "halo_size": 1}},
    "nasnetalarge": {"stem_size": 32, "num_features": 384},
}


def narrowed(chosen: Candidate) -> Candidate:
    """Give a model narrower, where its builder can."""
    options = _NARROW.get(chosen.name, {})
    return replace(chosen, build=functools.partial(chosen.build, **options))


@functools.cache
def _torchvision() -> dict[str, str]:
    import torchvision.models as zoo

    found = {}
    for kind in KINDS:
        module = zoo if kind == "classification" else getattr(zoo, kind)
        found.update({name: kind for name in zoo.list_models(module=module)})
    return found


def _from_torchvision(name: str, kind: str) -> Candidate:
    import torchvision.models as zoo

    takes = inspect.signature(zoo.get_model_builder(name)).parameters
    without = {key: None for key in ("weights", "weights_backbone") if key in takes}
    attempts: list[Attempt] = []
    if kind == "detection":
        # No box would pass the usual thresholds of random weights.
        stages = {f"rpn_{p}_nms_top_n_{m}": 40 for p in ("pre", "post") for m in ("train", "test")}
        two_stage = {"box_score_thresh": 0.0, "box_detections_per_img": 10, **stages}
        one_stage = {"score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 40}
        small = {"min_size": 96, "max_size": 96}
        for options in ({**small, **two_stage}, {**small, **one_stage}, one_stage, {}):
            attempts.append(Attempt("96 px", options, detection_samples(96)))
    elif kind == "video":
        sizes = ((4, 64), (8, 64), (8, 112), (16, 112), (16, 224))
        attempts = [Attempt(f"{t}x{s} px", {}, images(3, t, s, s)) for t, s in sizes]
    elif kind == "optical_flow":
        attempts = [Attempt("2 x 128 px", {}, image_pairs(128))]
    else:
        attempts = [Attempt(f"{s} px", {}, images(3, s, s)) for s in (*SIZES, 299)]
    return Candidate(
        name, kind, lambda **options: zoo.get_model(name, **without, **options), attempts
    )


def image_pairs(size: int) -> Make:
    """Give batches of two tensors, as optical flow takes, and two for its number of updates."""

    def make(rows: Sequence[int], dtype: torch.dtype) -> Any:
        pair = torch.stack([numbered(r, 2, 3, size, size) for r in rows]).to(dtype)
        return pair[:, 0], pair[:, 1], 2

    return make


def detection_samples(size: int) -> Make:
    """Give lists of images and of targets, as torchvision's detectors take."""

    def make(rows: Sequence[int], dtype: torch.dtype) -> Any:
        pictures = [numbered(r, 3, size, size).sigmoid().to(dtype) for r in rows]
        box = torch.tensor([[8.0, 8.0, size / 2, size / 2]], dtype=dtype)
        target = {
            "boxes": box,
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, size, size, dtype=torch.uint8),
            "keypoints": torch.full((1, 17, 3), 20.0),
        }
        return pictures, [dict(target) for _ in rows]

    return make


@functools.cache
def _custom(source: str) -> dict[str, Candidate]:
    """Read `package.module:function`, which yields candidates or (name, builder, example inputs).

    Example inputs are a tensor, a tuple of arguments or a dict of keyword arguments, batch first,
    or a function of (sample numbers, dtype) that returns such inputs.
    """
    module, _, function = source.partition(":")
    try:
        items = list(getattr(importlib.import_module(module), function)())
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"expected --source timm, torchvision or package.module:function, got {source!r}: "
            f"{error}"
        ) from error
    found: dict[str, Candidate] = {}
    for item in items:
        if isinstance(item, Candidate):
            found[item.name] = item
            continue
        if not isinstance(item, tuple) or len(item) != 3 or not callable(item[1]):
            raise RecipeError(
                f"expected {source} to yield (name, builder, example inputs), got {item!r}"
            )
        name, build, inputs = item
        if name in found:
            raise RecipeError(f"expected distinct names from {source}, got {name!r} twice")
        make = inputs if callable(inputs) else given_rows(inputs)
        found[name] = Candidate(name, module, build, [Attempt("given inputs", {}, make)])
    return found
