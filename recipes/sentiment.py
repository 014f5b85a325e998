"""`python -m recipes sentiment`: sentences of one kind to train on, of another to be tested on.

A convolutional sentence classifier (Kim, "Convolutional Neural Networks for Sentence
Classification", EMNLP 2014) with BatchNorm after its convolutions, its word vectors learned from
scratch. BatchNorm beside CrossNorm, SelfNorm and both, after the same norms: features here are
(N, C, words). The setting is chosen on the validation sentences, which are of the training kind;
nothing of the other kind is seen before the end. The kinds differ in their balance of classes, so
that the mean of the two classes' accuracies stands beside the accuracy.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn

import normswap

from .common import grid, methods, reports
from .common.errors import check
from .common.options import Parser, resolve
from .common.training import Log, descend

FILES = {
    "train": "stsa.binary.train.txt",
    "valid": "stsa.binary.dev.txt",
    "source": "stsa.binary.test.txt",
    "target": "custrev.all.txt",
}
METHODS = ("bn", "crossnorm", "selfnorm", "cnsn")
ACCURACIES = {
    "valid": "films, validation",
    "source": "films, test",
    "target": "products",
    "balanced": "products, mean of classes",
}
BATCH = 50
PAD, UNKNOWN = 0, 1
SMOKE_SENTENCES = 200
Lines = Sequence[tuple[int, list[str]]]


class Sentences(NamedTuple):
    """Labelled sentences. Shape: words (N, L) int64, padded with `PAD`; labels (N,) int64."""

    words: Tensor
    labels: Tensor


class SentenceCNN(nn.Module):
    """Word vectors, convolutions over 3, 4 and 5 words, norm, maximum over the sentence."""

    def __init__(self, words: int, width: int = 128, maps: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=PAD)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, maps, span, padding=span - 1), nn.BatchNorm1d(maps))
            for span in (3, 4, 5)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3 * maps, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).transpose(1, 2)
        found = [F.relu(conv(x)).amax(2) for conv in self.convs]
        return self.head(self.dropout(torch.cat(found, 1)))


def run(options: Namespace) -> None:
    check(options.data, f"expected --data, a folder with {', '.join(FILES.values())}")
    resolve(options, backbone=False, epochs=1)
    files = {part: read(options.data / name) for part, name in FILES.items()}
    if options.smoke:
        steps = {part: max(len(lines) // SMOKE_SENTENCES, 1) for part, lines in files.items()}
        files = {part: lines[:: steps[part]] for part, lines in files.items()}
    words = vocabulary(files["train"])
    data = {part: encode(lines, words) for part, lines in files.items()}
    given = data, len(words) + 2
    chosen = itemgetter("valid")
    folder, records = grid.run(options, "sentiment", lambda _: given, train_one, chosen)
    most = data["target"].labels.bincount().max().item() / len(data["target"].labels)
    note = f"Of the product sentences {100 * most:.1f} % are of the larger class."
    more = {"best_epoch": "epoch"}
    reports.show(folder, records, ACCURACIES, "sentences, by norm", more, notes=[note])


def build(method: str, words: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    inserted = method in ("crossnorm", "selfnorm", "cnsn")
    placed = {"placement": "norm"} if inserted else {}
    return methods.convert(SentenceCNN(words), method, None, verify=False, **placed)


def train_one(
    given: tuple[dict[str, Sentences], int], config: Namespace, log: Log
) -> dict[str, Any]:
    """Train one model; give the accuracies of its epoch that is best on the validation part."""
    (data, words), device = given, config.device
    model = build(config.method, words, config.seed).to(device)
    groups = normswap.param_groups(model, config.lr, config.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    best: dict[str, Any] = {"valid": -1.0}
    parts = ("valid", "source", "target") if config.final else ("valid",)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
        torch.manual_seed(config.seed * 1000 + epoch)
        model.train()
        total = 0.0
        for inputs, labels in batches(data["train"], BATCH, generator):
            loss = F.cross_entropy(model(inputs.to(device)), labels.to(device))
            descend(loss, optimizer)
            total += loss.item() * len(labels)
        found = {part: predict(model, data[part], device) for part in parts}
        figures = {p: 100 * accuracy_score(data[p].labels, found[p]) for p in found}
        if config.final:
            truth, guess = data["target"].labels, found["target"]
            figures["balanced"] = 100 * balanced_accuracy_score(truth, guess)
        log({"epoch": epoch + 1, "loss": total / len(data["train"].labels), **figures})
        if figures["valid"] > best["valid"]:
            best = {**figures, "best_epoch": epoch + 1}
    return best


@torch.no_grad()
def predict(model: nn.Module, data: Sentences, device: torch.device) -> Tensor:
    model.eval()
    return torch.cat([model(words.to(device)).argmax(1).cpu() for words, _ in batches(data, 256)])


def read(path: Path) -> Lines:
    """Read a file with one ``label text`` a line, label 0 or 1; says how many have no words."""
    check(path.is_file(), f"expected a file of `label text` lines at {path}, found none")
    found, empty = [], 0
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        label, _, text = line.strip().partition(" ")
        expected = f"expected `0 text` or `1 text` in line {number} of {path}"
        check(label in ("0", "1", ""), f"{expected}, got {line[:40]!r}")
        if text.split():
            found.append((int(label), text.split()))
        empty += bool(label and not text.split())
    if empty:
        print(f"{path.name}: left out {empty} line(s) that have a label and no words")
    check(found, f"expected sentences in {path}, found none")
    return found


def vocabulary(sentences: Lines, least: int = 2) -> dict[str, int]:
    """Number the words that occur `least` times or more; 0 pads, 1 is every other word."""
    counts = Counter(word for _, text in sentences for word in text)
    return {word: i + 2 for i, word in enumerate(w for w, n in counts.items() if n >= least)}


def encode(sentences: Lines, words: dict[str, int], longest: int = 56) -> Sentences:
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


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS, ("bn", *normswap.methods()), seeds=5)
    files = f"folder with {', '.join(FILES.values())}; it has no default"
    parser.add_argument("--data", type=Path, help=files)
    parser.share("tune", epochs=8, lr=1e-3, weight_decay=0.01)
