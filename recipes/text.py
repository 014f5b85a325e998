"""Sentences as rows of word numbers: files of ``label text`` lines, a vocabulary, batches."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import RecipeError

PAD, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences. Shape: words (N, L) int64, padded with `PAD`; labels (N,) int64."""

    words: Tensor
    labels: Tensor


def read(path: Path) -> list[tuple[int, list[str]]]:
    """Read a file with one ``label text`` a line, label 0 or 1; says how many have no words."""
    if not path.is_file():
        raise RecipeError(f"expected a file of `label text` lines at {path}, found none")
    found, empty = [], 0
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        label, _, text = line.strip().partition(" ")
        if not line.strip():
            continue
        if label in ("0", "1") and not text.split():
            empty += 1
            continue
        if label not in ("0", "1"):
            raise RecipeError(
                f"expected `0 text` or `1 text` in line {number} of {path}, got {line[:40]!r}"
            )
        found.append((int(label), text.split()))
    if empty:
        print(f"{path.name}: left out {empty} line(s) that have a label and no words")
    if not found:
        raise RecipeError(f"expected sentences in {path}, found none")
    return found


def vocabulary(sentences: Sequence[tuple[int, list[str]]], least: int = 2) -> dict[str, int]:
    """Number the words that occur `least` times or more; 0 pads, 1 is every other word."""
    counts = Counter(word for _, text in sentences for word in text)
    return {word: i + 2 for i, word in enumerate(w for w, n in counts.items() if n >= least)}


def encode(
    sentences: Sequence[tuple[int, list[str]]], words: dict[str, int], longest: int = 56
) -> Sentences:
    """Turn sentences into numbers, cut or padded to `longest` words."""
    rows = torch.full((len(sentences), longest), PAD)
    for row, (_, text) in zip(rows, sentences, strict=True):
        numbers = [words.get(word, UNKNOWN) for word in text[:longest]]
        row[: len(numbers)] = torch.tensor(numbers)
    return Sentences(rows, torch.tensor([label for label, _ in sentences]))


def batches(
    data: Sentences, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give batches of (words, labels): shuffled with a generator, whole and in order without."""
    count = len(data.labels)
    order = torch.arange(count)
    if generator is not None:
        order = torch.randperm(count, generator=generator)[: max(count // size, 1) * size]
    for chosen in order.split(size):
        yield data.words[chosen], data.labels[chosen]
