"""One program for each construct: it alone, in both modes, around each change."""

from textwrap import indent

from tests.graph.fuzz.constructs import Construct
from tests.graph.fuzz.program import PREAMBLE, Action, Call, Change, Copy, Original, Program


def alone(construct: Construct) -> Program:
    """Return the program of a construct."""
    fills = {"$c": "self.c", "$d": "self.d", "$new": "Block()", "$i": "0"}
    body = "x = self.c0(x)"
    module, init, forward = construct.module, construct.init, construct.forward
    lines = []
    for line in forward.splitlines():
        space = line[: len(line) - len(line.lstrip())]
        lines.append(indent(body, space) if line.strip() == "$body" else line)
    forward = "\n".join(lines)
    for hole, value in fills.items():
        module, init, forward = (text.replace(hole, value) for text in (module, init, forward))
    made = f"self.c0 = Block()\nself.c = Block()\nself.d = nn.BatchNorm2d(4)\n{init}"
    source = (
        f"{PREAMBLE}\n\n{module}\n\n\nclass Model(nn.Module):\n    def __init__(self):\n"
        f"        super().__init__()\n{indent(made, ' ' * 8)}\n\n    def forward(self, x):\n"
        f"        x = self.c0(x)\n{indent(forward, ' ' * 8)}\n        return x\n"
    )
    one = 0 if construct.mixes or construct.carries else None
    mixed = Call(labels=(0, 1, 1) if one is None else (0,))
    actions: list[Action] = [mixed, Call(train=True), mixed, Original()]
    for change in construct.changes:
        code = change.replace("$i", "0").replace("$c", "model.c")
        actions += [Change(code), mixed, Call(train=True)]
    other = Call(labels=(1, 0, 1, 0) if one is None else (0,), batch=4, size=8)
    last = Call(labels=(1 if one is None else 0,), batch=1)
    actions += [Copy("deepcopy"), other, Call(labels=(0,) * 3, train=True, size=4), mixed, last]
    return Program(source, tuple(actions), one=one, names=(construct.name,))
