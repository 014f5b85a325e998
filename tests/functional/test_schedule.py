import itertools
import threading
from collections import Counter

import pytest
import torch

from normswap.errors import ConversionError
from normswap.functional.schedule import Schedule
from normswap.methods.crossnorm import CrossNorm
from tests.support.sampling import sampled

COUNT = 10_000


def ask_all(schedule):
    schedule.begin()
    flags = [schedule.fires(site) for site in range(schedule.num_sites)]
    schedule.end()
    return flags


def compiled_draw(schedule, backend):
    def forward(x):
        schedule.begin(x.device)
        flags = [schedule.fires(site, x.device) for site in range(schedule.num_sites)]
        schedule.end()
        return torch.stack(flags)

    torch._dynamo.reset()
    return torch.compile(forward, fullgraph=True, backend=backend)


def compiled_layers(schedule, backend):
    """What fired is read off the layers' outputs."""
    crossnorm = CrossNorm()

    def forward(x):
        schedule.begin(x.device)
        sites = range(schedule.num_sites)
        outputs = [crossnorm(x, schedule.fires(site, x.device)) for site in sites]
        schedule.end()
        return torch.stack([(y != x).any() for y in outputs])

    torch._dynamo.reset()
    return torch.compile(forward, fullgraph=True, backend=backend)


def draws(mode, schedule, count, backend="aot_eager"):
    torch.manual_seed(0)
    if mode == "eager":
        return torch.tensor([ask_all(schedule) for _ in range(count)])
    # All of 12 instances keep their style once in 12! times.
    x = torch.randn(12, 1, 2)
    compiled = compiled_draw if mode == "compiled" else compiled_layers
    run = compiled(schedule, backend)
    return torch.stack([run(x) for _ in range(count)])


@pytest.mark.parametrize(
    ("mode", "p", "active", "count", "backend"),
    sampled(
        [
            *(("eager", 0.5, 2, COUNT, ""), ("eager", 0.25, 1, COUNT, "")),
            ("compiled", 0.5, 2, 4000, "aot_eager"),
            ("compiled layers", 0.5, 2, 4000, "aot_eager"),
            *(
                ("compiled", 0.25, 1, COUNT, "inductor"),
                ("compiled layers", 0.5, 2, COUNT, "inductor"),
            ),
        ],
        3,
    ),
)
def test_how_often_and_where_it_fires(mode, p, active, count, backend):
    sites = 6
    fired = draws(mode, Schedule(p, active, sites), count, backend)
    per_forward = fired.sum(1)
    assert set(per_forward.tolist()) == {0, active}

    def close(observed, probability):
        """Within five standard deviations of Binomial(count, probability): once in 1.7e6."""
        spread = (count * probability * (1 - probability)) ** 0.5
        return abs(int(observed) - count * probability) <= 5 * spread

    assert close((per_forward > 0).sum(), p)
    for site in range(sites):
        assert close(fired[:, site].sum(), p * active / sites)
    pairs = list(itertools.combinations(range(sites), 2))
    for a, b in pairs:
        assert close((fired[:, a] & fired[:, b]).sum(), p * (active == 2) / len(pairs))
    # Consecutive forwards are independent.
    assert close((fired[1:, 0] & fired[:-1, 0]).sum(), (p * active / sites) ** 2)


# Inductor draws by generators of its own.
BACKENDS = [("eager", ""), ("compiled", "aot_eager"), ("compiled", "inductor")]


@pytest.mark.parametrize(("mode", "backend"), sampled(BACKENDS, 2))
def test_no_two_forwards_share_a_draw(mode, backend):
    # 16 of 64 sites: C(64, 16) = 4.9e14 draws, so a repeat in 10,000 has probability 1e-7; in
    # eager mode, draws come from seeds of 32 bits: 1e-2, and this seed has none.
    fired = draws(mode, Schedule(1.0, 16, 64), COUNT if mode == "eager" else 2000, backend)
    assert len({tuple(row) for row in fired.tolist()}) == len(fired)


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (1.0, 3)])
def test_the_ends_of_p_are_exact(p, expected):
    schedule = Schedule(p, 3, 3)
    for _ in range(20):
        assert sum(ask_all(schedule)) == expected


@pytest.mark.parametrize(("mode", "backend"), sampled(BACKENDS, 2))
def test_reproducible_from_the_seed(mode, backend):
    schedule = Schedule(0.5, 2, 8)
    first = draws(mode, schedule, 50, backend)
    assert torch.equal(first, draws(mode, schedule, 50, backend))


def test_a_draw_moves_the_generator_alike_whether_it_fires_or_not():
    states = []
    for p in (0.0, 1.0):
        torch.manual_seed(0)
        ask_all(Schedule(p, 1, 4))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_answers_are_bools_in_eager_mode():
    assert {type(flag) for flag in ask_all(Schedule(0.5, 1, 3))} == {bool}


def test_a_site_that_asks_twice_begins_a_new_draw():
    torch.manual_seed(0)
    schedule = Schedule(0.5, 1, 2)
    schedule.begin()
    fired = [schedule.fires(0) for _ in range(2000)]
    # Site 0 alone, with probability p * active / num_sites, within five standard deviations.
    assert abs(sum(fired) - 500) <= 5 * (2000 * 0.25 * 0.75) ** 0.5
    # A draw that site 0 began holds for site 1: with p = 1, exactly one of them fires.
    schedule = Schedule(1.0, 1, 2)
    for _ in range(50):
        assert schedule.fires(0) + schedule.fires(1) == 1


def test_after_the_end_a_site_begins_a_new_draw():
    torch.manual_seed(0)
    schedule, seen = Schedule(1.0, 1, 2), Counter()
    for _ in range(40):
        schedule.begin()
        first = schedule.fires(0)
        schedule.end()
        seen[first, schedule.fires(1)] += 1
        schedule.end()
    # One draw never lets both, or neither, fire.
    assert seen[True, True]
    assert seen[False, False]


def test_compiled_parts_without_a_root_fire_at_the_marginal_rate():
    torch._dynamo.reset()
    torch.manual_seed(0)
    schedule = Schedule(0.5, 2, 4)
    run = torch.compile(lambda x: schedule.fires(1, x.device), fullgraph=True, backend="aot_eager")
    fired = sum(bool(run(torch.zeros(()))) for _ in range(2000))
    assert abs(fired - 500) <= 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_a_graph_break_keeps_the_draw():
    torch._dynamo.reset()
    torch.manual_seed(0)
    schedule = Schedule(1.0, 1, 2)

    @torch.compiler.disable
    def eager_part(x):
        return torch.as_tensor(schedule.fires(1, x.device))

    @torch.compile(backend="aot_eager")
    def forward(x):
        schedule.begin(x.device)
        first = schedule.fires(0, x.device)
        second = eager_part(x)
        schedule.end()
        return first, second

    seen = [forward(torch.zeros(())) for _ in range(30)]
    assert all(bool(a) != bool(b) for a, b in seen)
    assert len({bool(a) for a, _ in seen}) == 2


def test_replicas_in_threads_each_have_a_draw():
    # The published flags on modules are lost in the replicas of DataParallel.
    schedule, sums, barrier = Schedule(1.0, 2, 6), [], threading.Barrier(4)

    def replica():
        for _ in range(50):
            barrier.wait()
            schedule.begin()
            flags = []
            for site in range(6):
                barrier.wait()
                flags.append(schedule.fires(site))
            sums.append(sum(flags))

    threads = [threading.Thread(target=replica) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [2] * 200


def test_the_memory_of_answers_is_bounded():
    schedule = Schedule(0.5, 1, 1)
    for _ in range(5000):
        schedule.fires(0)
    assert len(schedule._answers) == 4096


def test_bad_arguments_are_named():
    with pytest.raises(ConversionError, match=r"p= in \[0, 1\], got -1"):
        Schedule(-1, 1, 2)
    with pytest.raises(ConversionError, match="num_sites= of at least 1, got 0"):
        Schedule(0.5, 1, 0)
    with pytest.raises(ConversionError, match=r"active= in \[1, 2\], the number of sites, got 3"):
        Schedule(0.5, 3, 2)
