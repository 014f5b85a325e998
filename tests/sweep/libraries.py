"""`python -m tests.sweep.libraries`: whether models of other libraries are converted at all.

Nothing is run, so that every architecture of a library takes seconds: what is refused at conversion
is printed, with its reason, and the exit code is 1. Models that need a download are not built.
`python -m tests.sweep --source tests.sweep.zoos:smp` (`:ultralytics`, `:monai`,
`tests.sweep.zoo_transformers:models`) runs and checks small ones.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normswap
from normswap.sites import find_norms, read_site

Build = Callable[[], nn.Module]
DECODERS = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3"]
DECODERS += ["DeepLabV3Plus", "UPerNet", "Segformer"]
ENCODERS = ["resnet18", "mobilenet_v2", "tu-efficientnet_b0", "timm-regnetx_002", "densenet121"]


def transformers_models() -> Iterator[tuple[str, Build]]:
    """Yield every configuration as it is by default, on the meta device."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def build(make: Any) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(make())
        return model

    for name in CONFIG_MAPPING:
        yield name, partial(build, CONFIG_MAPPING[name])


def torchvision_models() -> Iterator[tuple[str, Build]]:
    import torchvision.models as zoo

    for name in zoo.list_models():
        backbone = "backbone" in str(zoo.get_model_builder(name).__annotations__)
        options = {"weights": None} | ({"weights_backbone": None} if backbone else {})
        yield name, partial(zoo.get_model, name, **options)


def smp_models() -> Iterator[tuple[str, Build]]:
    import segmentation_models_pytorch as smp

    for decoder in DECODERS:
        for encoder in ENCODERS:
            yield (
                f"{decoder}, {encoder}",
                partial(getattr(smp, decoder), encoder, encoder_weights=None),
            )


def ultralytics_models() -> Iterator[tuple[str, Build]]:
    import ultralytics

    for path in sorted((Path(ultralytics.__file__).parent / "cfg" / "models").rglob("*.yaml")):
        kind = ultralytics.RTDETR if "rtdetr" in path.stem else ultralytics.YOLO
        yield path.stem, lambda kind=kind, path=path: kind(str(path)).model


SOURCES: dict[str, Callable[[], Iterator[tuple[str, Build]]]] = {
    "torchvision": torchvision_models,
    "transformers": transformers_models,
    "smp": smp_models,
    "ultralytics": ultralytics_models,
}


def try_model(build: Build, method: str) -> tuple[str, int]:
    """Return what became of a model, and its number of norms."""
    try:
        model = build()
    except Exception as error:  # of the library: a download, a combination it does not have
        return f"not built: {type(error).__name__}", 0
    norms = sum(not isinstance(read_site(*norm), str) for norm in find_norms(model))
    if not norms:
        return "no norms", 0
    try:
        normswap.convert(model, method, contexts=2, inplace=True, verify=False)
    except normswap.NormswapError as error:
        return f"refused: {error}", norms
    return "converted", norms


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.libraries", description=__doc__)
    parser.add_argument("sources", nargs="+", choices=SOURCES)
    parser.add_argument("--method", default="cn")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    count: Counter[tuple[str, str]] = Counter()
    for source in options.sources:
        for name, build in SOURCES[source]():
            what, norms = try_model(build, options.method)
            kind = what.partition(":")[0]
            count[source, kind] += 1
            if norms:
                count[source, f"norms {kind}"] += norms
            if kind == "refused":
                print(f"{source}, {name}: {what}", flush=True)
    for (source, kind), number in count.items():
        print(f"{source}: {number} {kind}")
    return int(any(kind == "refused" for _, kind in count))


if __name__ == "__main__":
    sys.exit(main())
