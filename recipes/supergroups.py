"""Contexts of images whose domains are one: superclasses of their classes, or clusters of them."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

import normswap

from .data import TEST_BATCH, DomainData, Loader
from .errors import RecipeError

DIGITS = ("round=0,6,8,9", "straight=1,4,7", "curved=2,3,5")
PACS = ("animals=dog,elephant,giraffe,horse", "others=guitar,house,person")


def with_superclasses(data: DomainData, given: Sequence[str]) -> DomainData:
    """Make a domain of each superclass."""
    mapping: str | dict[str, str] = {}
    if list(given) == ["cifar100"]:
        mapping = "cifar100"
    else:
        for text in given:
            name, equals, members = text.partition("=")
            for member in members.split(","):
                if not (name and equals and member in data.classes) or member in mapping:
                    raise RecipeError(
                        "expected --superclasses NAME=CLASS,CLASS ... with each class of the data "
                        f"once, got {text!r}; the classes are {', '.join(data.classes)}"
                    )
                mapping[member] = name
    with warnings.catch_warnings():
        # It warns that such labels leak at test time: what this recipe is about.
        warnings.simplefilter("ignore", normswap.ContextWarning)
        assigner = normswap.contexts.from_superclasses(mapping, data.classes)
    return replace(data, domains=assigner(data.labels), domain_names=list(assigner.names))


def with_clusters(
    loader: Loader, features: Literal["pixels"] | nn.Module, clusters: int, seed: int
) -> tuple[DomainData, str]:
    """Make a domain of each cluster of the training images; every image is assigned by itself."""
    data = loader.data
    every = [loader.normalised(part) for part in data.images.split(TEST_BATCH)]
    trains = [loader.normalised(part) for part in data.images[data.train].split(TEST_BATCH)]
    if isinstance(features, nn.Module):
        features = copy.deepcopy(features).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", normswap.ContextWarning)  # of small clusters: reported
        assigner = normswap.contexts.kmeans(trains, clusters, features, seed=seed, progress=False)
    found = torch.cat([assigner(part).cpu() for part in every])
    shown = []
    for cluster in range(clusters):
        inside = data.domains[data.train & (found == cluster)].tolist()
        kinds = [f"{inside.count(i)} {name}" for i, name in enumerate(data.domain_names)]
        shown.append(f"cluster {cluster}: " + ", ".join(kinds))
    names = [f"cluster {k}" for k in range(clusters)]
    return replace(data, domains=found, domain_names=names), "; ".join(shown)
