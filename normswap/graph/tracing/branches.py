"""Forwards that branch on values only a run knows: one trace for each path, joined by real ifs.

Where a traced forward asks whether a symbolic value is true, the trace answers, and is repeated
with the other answer. The paths share their calls up to the question; what follows it is a graph of
its own for each answer, and the question is asked anew in every run.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from normswap.graph.tracing.failure import TraceFailure, in_words, is_raised
from normswap.graph.tracing.method_calls import methods_failed
from normswap.graph.tracing.symbol import is_pure
from normswap.graph.tracing.traced import Traced
from normswap.graph.tracing.tracer import ContainerTracer

MOST_PATHS = 16
Run = Callable[..., Any]


class Branch:
    """Goes on with one of two graphs.

    Attributes:
        runs: what follows for False and for True, each with the positions of its values.
    """

    __name__ = "branch"
    __module__ = "normswap.graph.tracing.branches"

    def __init__(self, *runs: tuple[Run, tuple[int, ...]]) -> None:
        self.runs = runs

    def __call__(self, module: Any, condition: Any, *values: Any) -> Any:
        """Run what follows."""
        if condition:
            run, places = self.runs[1]
        else:
            run, places = self.runs[0]
        return run(module, *[values[i] for i in places])


def explore(trace: Callable[[tuple[bool, ...]], Traced]) -> list[Traced]:
    """Return every path of a forward.

    Args:
        trace: traces with these answers to the first questions, and True to those that follow.

    Raises:
        TraceFailure: there are more than `MOST_PATHS`, or none that a graph stands for.
    """
    paths: list[Traced] = []
    todo: list[tuple[bool, ...]] = [()]
    while todo:
        prefix = todo.pop()
        path = trace(prefix)
        paths.append(path)
        answers = path.answers
        todo += [(*answers[:i], not answers[i]) for i in range(len(prefix), len(answers))]
        if len(paths) + len(todo) > MOST_PATHS:
            reason = f"branches in more than {MOST_PATHS} ways on values only known when it runs"
            raise TraceFailure(reason, [m for p in paths for m in p.asked_in])
    if all(path.failure for path in paths):
        raise TraceFailure(paths[0].failure, paths[0].asked_in)
    return paths


def join(paths: list[Traced], make: Callable[[fx.Graph], Run], own: Run) -> Run:
    """Compile the graphs of all paths of a forward to one function.

    Args:
        paths: of `explore`.
        make: compiles a graph.
        own: runs the module's own forward on the arguments of the graph and the context.

    Raises:
        TraceFailure: the paths differ before the question that parts them.
    """
    if len(paths) == 1:
        return make(paths[0].graph)
    return _join(paths, make, own, 0, 0)[0]


def _join(
    paths: list[Traced], make: Callable[[fx.Graph], Run], own: Run, depth: int, start: int
) -> tuple[Run, list[str]]:
    """Compile what follows the first `depth` questions, on whose answers these paths agree.

    Args:
        paths: those.
        make: compiles a graph.
        own: runs the module's own forward.
        depth: number of questions asked already.
        start: position of the first node that comes after them.

    Returns:
        The function, and the names of the earlier values it takes.
    """
    head = paths[0]
    nodes = list(head.graph.nodes)
    if len(head.answers) == depth:
        if head.failure:
            return own, [node.name for node in nodes if node.op == "placeholder"]
        return _compile(nodes[start:], None, make)
    stop = nodes.index(head.questions[depth]) + 1
    body = nodes[start:stop]
    for path in paths[1:]:
        other = list(path.graph.nodes)[start:stop]
        if [(n.name, n.op) for n in other] != [(n.name, n.op) for n in body]:
            raise TraceFailure("runs differently each time it is traced")
    arms = []
    for answer in (False, True):
        taken = [path for path in paths if path.answers[depth] is answer]
        arms.append(_join(taken, make, own, depth + 1, stop))
    needed_names = list(dict.fromkeys(name for _, names in arms for name in names))
    branch = Branch(
        *((run, tuple(needed_names.index(name) for name in names)) for run, names in arms)
    )
    return _compile(body, (branch, head.questions[depth].name, needed_names), make)


def _compile(
    body: list[fx.Node], end: tuple[Branch, str, list[str]] | None, make: Callable[[fx.Graph], Run]
) -> tuple[Run, list[str]]:
    """Compile a stretch of a graph that ends in its output, or in a branch."""
    defined = {node.name for node in body}
    wanted = [n.name for node in body for n in node.all_input_nodes]
    if end is not None:
        wanted += [end[1], *end[2]]
    needed = list(dict.fromkeys(name for name in wanted if name not in defined))
    graph = fx.Graph()
    copies = {name: graph.placeholder(name) for name in needed}
    for node in body:
        copies[node.name] = graph.node_copy(node, lambda n: copies[n.name])
    if end is not None:
        branch, question, needed_names = end
        itself = graph.create_node("get_attr", "converted_container", (), {})
        values = (copies[question], *(copies[name] for name in needed_names))
        graph.output(graph.call_function(branch, (itself, *values)))
    return make(graph), needed


def end_at_question(tracer: ContainerTracer, error: Exception) -> None:
    """End a path that failed at its last question.

    From there the module's own forward runs from its start: nothing but reads has run by then.

    Raises:
        TraceFailure: something else has.
    """
    result, reason, methods = tracer.result, in_words(error), methods_failed(tracer.root, error)
    nodes = list(result.graph.nodes)
    last = nodes.index(result.questions[-1]) + 1 if result.questions else 0
    if not last or not all(map(is_pure, nodes[:last])):
        if last and is_raised(error):
            reason = f"may raise {type(error).__name__} after it has called other modules"
        raise TraceFailure(reason, methods) from error
    for node in reversed(nodes[last:]):
        result.graph.erase_node(node)
    result.outlined = [node for node in result.outlined if node in nodes[:last]]
    result.failure = reason
