"""Questions a forward asks of symbolic values: what changes nothing, what was asked before."""

from typing import Any

from torch import fx

MOST_QUESTIONS = 64
# What reads a value without changing anything.
_PURE_METHODS = {
    *("size", "dim", "ndimension", "numel", "nelement", "is_contiguous", "is_floating_point"),
    *("element_size", "get_device", "stride"),
}
_PURE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout"}
_CHANGES = {
    *("setitem", "delitem", "call", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul"),
    *("imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor"),
}


def is_pure(node: fx.Node) -> bool:
    """Return whether running a node changes nothing and could as well be done again."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") in ("_operator", "operator"):
        return name not in _CHANGES
    return bool(getattr(node.target, "pure", False)) or node.target in (
        getattr,
        len,
        bool,
        int,
        float,
    )


def question_key(value: Any) -> Any:
    """Return what identifies a question about shapes and the like; None for other questions.

    Two questions of one key have one answer.
    """
    if not isinstance(value, fx.Node):
        try:
            hash(value)
        except TypeError:
            return None
        return (type(value), value)
    attribute = value.target is getattr and value.args[1] in _PURE_ATTRIBUTES
    if attribute or (value.op == "call_method" and value.target in _PURE_METHODS):
        rest = tuple(question_key(a) for a in (*value.args[1:], *value.kwargs.values()))
        return None if None in rest else (value.target, value.args[0], *rest)
    if value.op == "call_function" and is_pure(value) and value.target is not getattr:
        parts = tuple(question_key(a) for a in (*value.args, *value.kwargs.values()))
        return None if None in parts else (value.target, *parts)
    return None
