"""What of a scope belongs to a thread, in a form that compiled code reads and writes."""

import threading
from dataclasses import dataclass
from typing import NamedTuple

from normswap.functional.labels import Context


class Entry(NamedTuple):
    """A context that was put in scope; None in its place means explicitly none.

    Attributes:
        context: the labels.
        task: the backward in which that happened; -1 outside of backward.
    """

    context: Context | None
    task: int = -1


SEVERAL = Entry(None, -2)


@dataclass(eq=False)
class Here:
    """What compiled code can read and write of a thread.

    Attributes:
        entry: of the innermost forward that runs. A forward never awaits: it is its task's, too.
        compiled: of the innermost block, where compiled code opened it.
        mirror: of the innermost block, for compiled code that cannot ask for its task's; `SEVERAL`
            where blocks of several tasks are open.
        blocks: how many are open, of all tasks.
        labelled: how many of those have labels.
        forwards: how many entries have labels.
    """

    entry: Entry | None = None
    compiled: Entry | None = None
    mirror: Entry | None = None
    blocks: int = 0
    labelled: int = 0
    forwards: int = 0


class Local(threading.local):
    """Gives each thread its own; compiled code would lose what is written to this one itself."""

    def __init__(self) -> None:
        self.here = Here()
