"""Make a failing program small: leave out statements and actions while it fails in the same way."""

import ast
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.graph.fuzz.program import PREAMBLE, Call, Program

_SEQUENTIAL = "nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())"


def shrink(program: Program, fails: Callable[[Program], bool], seconds: float = 60) -> Program:
    """Return a program that no single deletion makes smaller and that still fails.

    Args:
        program: one that fails.
        fails: whether a smaller one fails in the same way.
        seconds: after which what was reached is returned.
    """
    end = time.monotonic() + seconds
    before = None
    while before != program and time.monotonic() < end:
        before = program
        for step in (_actions, _statements, _children):
            program = _take(program, step, fails, end)
    return program


def _take(program: Program, step: Callable, fails: Callable, end: float) -> Program:
    """Try the changes of a step by index; one that works makes room for the next at its index."""
    index = 0
    while time.monotonic() < end:
        candidate = step(program, index)
        if candidate is None:
            break
        if candidate != program and fails(candidate):
            program = candidate
        else:
            index += 1
    return program


def _nth(candidates: Iterator[Program], index: int) -> Program | None:
    return next((c for k, c in enumerate(candidates) if k == index), None)


def _actions(program: Program, index: int) -> Program | None:
    return _nth(_fewer_actions(program), index)


def _fewer_actions(program: Program) -> Iterator[Program]:
    actions = program.actions
    for k in reversed(range(len(actions))):
        yield replace(program, actions=actions[:k] + actions[k + 1 :])
    for settings in ({"apart": False}, {"unknown": "pooled"}, {"verify": False}, {"one": None}):
        yield replace(program, **settings)
    for k, action in enumerate(actions):
        for simple in _simpler(action):
            yield replace(program, actions=(*actions[:k], simple, *actions[k + 1 :]))


def _simpler(action: object) -> Iterator[object]:
    if isinstance(action, Call):
        plain = {"labels": (0,), "train": False, "size": 6, "through": "argument"}
        for name, value in plain.items():
            yield replace(action, **{name: value})


def _children(program: Program, index: int) -> Program | None:
    body = program.source.removeprefix(PREAMBLE)
    plain = "nn.BatchNorm2d(4)"
    choices = [(old, old_at) for old in (_SEQUENTIAL, "Block()") for old_at in _find(body, old)]
    if index >= len(choices):
        return None
    old, at = choices[index]
    return _with(program, body[:at] + plain + body[at + len(old) :])


def _find(text: str, part: str) -> list[int]:
    return [k for k in range(len(text)) if text.startswith(part, k)]


def _with(program: Program, body: str) -> Program:
    return replace(program, source=f"{PREAMBLE}\n\n{body.strip()}\n")


def _statements(program: Program, index: int) -> Program | None:
    """Delete a statement, or (odd indices) put its body in its place."""
    tree = ast.parse(program.source.removeprefix(PREAMBLE))
    number, lift = divmod(index, 2)
    for block in _blocks(tree):
        if number >= len(block):
            number -= len(block)
            continue
        inner = getattr(block[number], "body", None)
        if lift and (not isinstance(inner, list) or isinstance(block[number], ast.ClassDef)):
            return program
        if not lift and isinstance(block[number], ast.Pass):
            return program
        block[number : number + 1] = inner if lift else []
        if not block and block is not tree.body and not _optional(tree, block):
            block.append(ast.Pass())
        return _with(program, ast.unparse(ast.fix_missing_locations(tree)))
    return None


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    names = ("body", "orelse", "finalbody")
    found = (getattr(node, name, None) for node in ast.walk(tree) for name in names)
    return [block for block in found if isinstance(block, list)]


def _optional(tree: ast.AST, block: list[ast.stmt]) -> bool:
    return any(getattr(node, "orelse", None) is block for node in ast.walk(tree))
