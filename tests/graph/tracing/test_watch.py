"""Each instruction of a forward is seen before it runs."""

import torch

from tests.support.behave import Block, check

runs = 0


class Counting(Block):
    def forward(self, x):
        global runs
        runs += 1
        return super().forward(x)


def check_counting(_):
    check(Counting(), opaque="sets runs outside")


def test_the_first_forward_of_a_process():
    # Of one that has imported what it needs, and run nothing.
    torch.multiprocessing.start_processes(check_counting, start_method="forkserver")


def test_a_forward_of_so_many_names_that_their_numbers_need_two_bytes():
    never = "".join(f"        name{number}\n" for number in range(300))
    code = f"def forward(self, x):\n    global runs\n    if x is None:\n{never}    runs = 1\n"
    scope = {}
    exec(f"{code}    return self.norm(self.conv(x))\n", scope)
    check(type("Long", (Block,), dict(scope, __module__=__name__))(), opaque="sets runs outside")
    assert "runs" in scope  # by a run, not by the trace
