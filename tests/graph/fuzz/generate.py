"""Programs at random, from the constructs."""

from textwrap import indent

from hypothesis import strategies as st

from tests.graph.fuzz.constructs import CONSTRUCTS, Construct
from tests.graph.fuzz.program import (
    PREAMBLE,
    Action,
    Call,
    Change,
    Copy,
    Original,
    Program,
    Threads,
)
from tests.graph.fuzz.roots import CHANGED, COMPILED, LEAVES, ROOTS, WRAPPED


class Builder:
    """Draws one program; numbers what it draws so that no two names are one."""

    def __init__(self, draw, allowed):
        self.draw = draw
        self.names = st.sampled_from(allowed)
        self.count = 0
        self.used: list[Construct] = []
        self.module: list[str] = []

    def number(self) -> int:
        self.count += 1
        return self.count - 1

    def pick(self, choices):
        return self.draw(st.sampled_from(choices))

    def child(self, depth: int) -> str:
        """Return an expression that makes a child."""
        if depth > 0 and self.draw(st.booleans()):
            return f"{self.part(depth - 1)}()"
        return self.pick(LEAVES)

    def part(self, depth: int) -> str:
        """Add a class to the module and return its name."""
        name = f"Part{self.number()}"
        forward, init = self.statements(depth, 2)
        self.add_class(name, "x", forward, "x", init)
        return name

    def add_class(self, name, signature, forward, output, init) -> None:
        made = indent("\n".join(init) or "pass", " " * 8)
        parts = (part for part in (forward, f"return {output}") if part)
        text = indent("\n".join(parts), " " * 8)
        self.module.append(
            f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{made}\n\n    def forward(self, {signature}):\n{text}"
        )

    def statements(self, depth: int, most: int) -> tuple[str, list[str]]:
        forward, init = [], []
        for _ in range(self.draw(st.integers(1, most))):
            text, made = self.statement(depth)
            forward.append(text)
            init += made
        return "\n".join(forward), init

    def statement(self, depth: int) -> tuple[str, list[str]]:
        chosen = CONSTRUCTS[self.draw(self.names)]
        if chosen.alone and chosen in self.used:
            chosen = CONSTRUCTS["call"]
        self.used.append(chosen)
        number, init = self.number(), []
        texts = [chosen.forward, chosen.init, chosen.module]
        for hole in ("$c", "$d"):
            if any(hole in text for text in texts):
                child = f"self.{hole[1]}{number}"
                init.append(f"{child} = {self.child(depth)}")
                texts = [text.replace(hole, child) for text in texts]
        if any("$new" in text for text in texts):
            new = self.child(depth)
            texts = [text.replace("$new", new) for text in texts]
        forward, own, module = (text.replace("$i", str(number)) for text in texts)
        if "$body" in forward:
            body, made = self.statements(depth - 1, 1) if depth > 0 else ("x = x * 2", [])
            init += made
            lines = []
            for line in forward.splitlines():
                space = line[: len(line) - len(line.lstrip())]
                lines.append(indent(body, space) if line.strip() == "$body" else line)
            forward = "\n".join(lines)
        if module:
            self.module.append(module.strip("\n"))
        if own:
            init.append(own)
        self.changes(chosen, number)
        return forward, init

    def changes(self, chosen: Construct, number: int) -> None:
        self.possible = getattr(self, "possible", [])
        self.possible += [c.replace("$i", str(number)) for c in chosen.changes]


@st.composite
def programs(draw, allowed: tuple[str, ...]) -> Program:
    """Draw a program from the constructs of these names."""
    builder = Builder(draw, allowed)
    signature, entry, output, calls = builder.pick(ROOTS)
    builder.possible = []
    forward, init = builder.statements(2, 4)
    first = f"self.c0 = {builder.child(1)}" if "self.c0 = " not in "\n".join(init) else ""
    ends = "\n".join(
        part for part in (entry, "" if not first else "x = self.c0(x)", forward) if part
    )
    builder.add_class("Model", signature, ends, output, [*filter(None, [first]), *init])
    source = f"{PREAMBLE}\n\n" + "\n\n\n".join(builder.module) + "\n"
    used = builder.used
    touching = any(c.mixes or c.carries for c in used)
    effects = any(c.effects for c in used)
    one = draw(st.sampled_from([0, 1])) if touching else None
    threads = one is None and not effects and not any(c.random for c in used)
    actions = [_action(draw, builder, calls, one, threads) for _ in range(draw(st.integers(3, 7)))]
    return Program(
        source,
        tuple(a for a in actions if a is not None),
        apart=draw(st.integers(0, 3)) > 0,
        unknown=draw(st.sampled_from(["pooled", "pooled", "b", "posterior"])),
        verify=not effects and draw(st.booleans()) and calls[0] == "model(x, **given)",
        one=one,
        names=tuple(sorted({c.name for c in used})),
    )


def _action(draw, builder, calls, one, threads) -> Action | None:
    kind = draw(st.sampled_from(["eval"] * 5 + ["train"] * 3 + ["change"] * 4 + ["other"] * 2))
    if kind == "change":
        wrapped = draw(st.integers(0, 19))
        if wrapped == 0:
            compiled = draw(st.integers(0, 29)) == 0
            return Change(COMPILED if compiled else builder.pick(WRAPPED))
        if wrapped == 1:
            return Change(builder.pick(CHANGED))
        return Change(builder.pick(builder.possible)) if builder.possible else None
    if kind == "other":
        other = draw(st.sampled_from(["deepcopy", "pickle", "threads", "original"]))
        if other in ("deepcopy", "pickle"):
            return Copy(other)
        if other == "original":
            return Original(calls[0])
        return Threads(calls[0]) if threads else None
    train = kind == "train"
    # With one sample, torch's own BatchNorm returns wrong gradients on the CPU where the input is
    # contiguous and the gradient channels last, or the reverse (torch 2.14).
    batch = draw(st.sampled_from([3, 3, 2, 4] if train else [3, 3, 2, 4, 1]))
    if one is not None or train:
        labels = (one if one is not None else draw(st.sampled_from([0, 1])),)
        labels = labels * draw(st.sampled_from([1, batch]))
    else:
        mixed = st.tuples(*[st.sampled_from([0, 1, 1, 0, None])] * batch)
        labels = draw(st.one_of(mixed, mixed, mixed, st.just((0,)), st.just((1,)), st.just(())))
    through = draw(st.sampled_from(["argument", "argument", "scope", "names"]))
    if None in labels and through == "names":
        through = "scope"
    return Call(
        draw(st.sampled_from(calls)),
        labels,
        train,
        batch,
        draw(st.sampled_from([6, 6, 4, 8])),
        through,
    )
