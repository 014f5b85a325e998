"""What forwards are made of: the text files of this folder, read."""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent

_FLAGS = ("mixes", "carries", "effects", "random", "alone")
_SECTIONS = ("module", "init", "forward", "change", "child", "block")
_CHILD = """\
class Child$i(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = $new

    def forward(self, {signature}):
{body}"""


@dataclass(frozen=True)
class Construct:
    """A way to turn `x`, (N, 4, H, W) with even H and W, into another such `x`.

    Holes: `$i` a number of its own; `$c`, `$d` children (attributes of self); `$new` an expression
    that makes a child; `$body` further statements.

    Attributes:
        name: of the construct.
        forward: statements of a forward.
        init: statements of `__init__`.
        module: statements of the module.
        changes: statements that change what it depends on, of which some are run between calls;
            they see `model`, `ns` (the module) and `each(name)` (submodules with an attribute).
        mixes: whether a sample's output, or a decision, depends on the values of other samples.
        carries: whether values of one call reach the next, or a caller sees them.
        effects: whether a call leaves something behind, so that calls at once have no fixed order.
        random: whether it draws random numbers, which threads would draw in no fixed order.
        alone: whether a program has it at most once.
    """

    name: str
    forward: str
    init: str = ""
    module: str = ""
    changes: tuple[str, ...] = ()
    mixes: bool = False
    carries: bool = False
    effects: bool = False
    random: bool = False
    alone: bool = False


def _read(entry: str) -> Construct:
    """Read `name: flags`, then sections indented by two, whose text is indented by four.

    Section `child` is short for `self.k$i`, a module that holds one child, `inner`: a line with
    the parameters of its forward, then its body. `block` is short for `self.k$i`, a subclass of
    `Block` with this body.
    """
    head, _, body = entry.partition("\n")
    name, _, flags = head.partition(":")
    parts = re.split(r"^  (\w+)\n", body, flags=re.MULTILINE)[1:]
    sections = [(k, dedent(v).strip("\n")) for k, v in zip(parts[::2], parts[1::2], strict=True)]
    assert {k for k, _ in sections} <= set(_SECTIONS), entry
    assert set(flags.split()) <= set(_FLAGS), entry
    texts = {k: v for k, v in sections if k != "change"}
    if "child" in texts:
        signature, _, body = texts.pop("child").partition("\n")
        texts["module"] = _CHILD.format(signature=signature, body=indent(body, " " * 8))
        texts["init"] = "self.k$i = Child$i()"
    if "block" in texts:
        texts["module"] = f"class K$i(Block):\n{indent(texts.pop('block'), ' ' * 4)}"
        texts["init"] = "self.k$i = K$i()"
    changes = tuple(v for k, v in sections if k == "change")
    return Construct(name, changes=changes, **texts, **dict.fromkeys(flags.split(), True))


def read_constructs() -> dict[str, Construct]:
    """Return every construct, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.txt")):
        for entry in re.split(r"\n(?=\w)", path.read_text()):
            if entry.strip() and not entry.startswith("#"):
                construct = _read(entry)
                assert construct.name not in found, construct.name
                found[construct.name] = construct
    return found


CONSTRUCTS = read_constructs()
