"""The known pipeline schedules, each as a pure function that lists the actions of every rank in order.

A schedule is written as rounds: for each rank, how often it repeats which passes. `(3, "F"), (5, "F B"), (3, "B")` is
1F1B on the fourth-last rank with 8 micro-batches. The rounds stand for the n-th pass of each kind; which stage and
micro-batch that is, its queue says. Where rounds need more micro-batches than there are, they are written for as many
as they need and the surplus is dropped: what is left still runs, as no micro-batch depends on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from triaxial.plan.layout import ScheduleKind
from triaxial.plan.pipeline.action import Action, ActionKind

Rank = tuple[Action, ...]
Rounds = Iterable[tuple[int, str]]


def stage_placement(kind: ScheduleKind, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of each virtual stage: ZB-V goes down the ranks and up again, all others start over."""
    if kind == "zb-v" and stages_per_rank == 2:
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(range(ranks)) * stages_per_rank


def gpipe(ranks: int, micro_batches: int) -> tuple[Rank, ...]:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    return tuple(
        _play([(micro_batches, "F"), (micro_batches, "B")], _one_stage(rank, micro_batches), micro_batches)
        for rank in range(ranks)
    )


def one_forward_one_backward(ranks: int, micro_batches: int) -> tuple[Rank, ...]:
    """1F1B (arXiv 2104.04473, section 2.2.1): a rank runs as far ahead as there are ranks behind it."""
    padded = max(micro_batches, ranks)

    def rounds(rank: int) -> Rounds:
        ahead = ranks - 1 - rank
        return [(ahead, "F"), (padded - ahead, "F B"), (ahead, "B")]

    return tuple(_play(rounds(rank), _one_stage(rank, padded), micro_batches) for rank in range(ranks))


def interleaved(ranks: int, micro_batches: int, virtual_stages: int) -> tuple[Rank, ...]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2.2): stage s on rank s % ranks, micro-batches in groups.

    A group passes all virtual stages of a rank before the next group starts. The paper's groups have as many
    micro-batches as there are ranks. Here they may have more, as even as can be, so that any number of micro-batches
    reaches the bubble (p-1)/(p-1+mv) as long as there is one for each rank.
    """
    num_groups = max(1, micro_batches // ranks)
    sizes = [micro_batches // num_groups + (group < micro_batches % num_groups) for group in range(num_groups)]
    groups = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes))]
    passes = micro_batches * virtual_stages

    def queues(rank: int) -> dict[str, Iterator[Action]]:
        stages = range(rank, ranks * virtual_stages, ranks)
        forwards = [Action("F", s, m) for group in groups for s in stages for m in group]
        backwards = [Action("B", s, m) for group in groups for s in reversed(stages) for m in group]
        return {"F": iter(forwards), "B": iter(backwards)}

    def rounds(rank: int) -> Rounds:
        ahead = min(passes, 2 * (ranks - 1 - rank) + (virtual_stages - 1) * sizes[0])
        return [(ahead, "F"), (passes - ahead, "F B"), (ahead, "B")]

    return tuple(_play(rounds(rank), queues(rank), micro_batches) for rank in range(ranks))


def zero_bubble_h(ranks: int, micro_batches: int, memory_limit: int) -> tuple[Rank, ...]:
    """ZB-H1 and ZB-H2 (arXiv 2401.10241, sections 2.1 and 2.2), and what lies between, below and above.

    The order is that of 1F1B with the backward split. Every rank delays its weight gradients until it holds
    `memory_limit` activations, which lets all of them hold equally many. Up to `ranks` that is 1F1B's run-ahead and
    1F1B's memory (H1); beyond, each rank runs ahead further, up to twice as far (H2: `2 * ranks - 1`).
    """
    padded = max(micro_batches, memory_limit)

    def rounds(rank: int) -> Rounds:
        behind = ranks - 1 - rank
        ahead = min(behind + min(behind, max(0, memory_limit - ranks)), memory_limit - 1)
        delayed = memory_limit - ahead
        return [(ahead, "F"), (delayed, "F I"), (padded - memory_limit, "W F I"), (ahead, "W I"), (delayed, "W")]

    return tuple(_play(rounds(rank), _one_stage(rank, padded), micro_batches) for rank in range(ranks))


def zero_bubble_v(ranks: int, micro_batches: int) -> tuple[Rank, ...]:
    """ZB-V (arXiv 2401.10241, section 6; arXiv 2405.15362): stages r and 2p-1-r on rank r, 2p activations of each.

    The passes of the first stage on a rank are numbered 0, those of the second 1. A rank opens with as many F0 as fit
    before the first micro-batch has been down the V and back to its F1. It then takes a new F0 for each F1 until it
    holds 2p - 1 activations, and F1 I1 W1, which leave none behind, until the first micro-batch is back at I0. From
    there on each round is one micro-batch's work.
    """
    padded = max(micro_batches, 2 * ranks)

    def rounds(rank: int) -> Rounds:
        behind = ranks - 1 - rank
        return [
            (2 * behind + 1, "F0"),
            (rank, "F1 F0"),
            (behind + 1, "F1 I1 W1"),
            (padded - ranks - behind, "F0 I0 W0 F1 I1 W1"),
            (behind, "I0 W0 F1 I1 W1"),
            (rank, "I0 I1"),
            (behind + 1, "I0 W0"),
            (rank, "W1 W0"),
        ]

    def queues(rank: int) -> dict[str, Iterator[Action]]:
        first, second = _one_stage(rank, padded), _one_stage(2 * ranks - 1 - rank, padded)
        return {f"{kind}0": queue for kind, queue in first.items()} | {f"{k}1": queue for k, queue in second.items()}

    return tuple(_play(rounds(rank), queues(rank), micro_batches) for rank in range(ranks))


def _one_stage(stage: int, micro_batches: int) -> dict[str, Iterator[Action]]:
    """Every kind of pass of one stage, in the order of the micro-batches."""
    kinds: tuple[ActionKind, ...] = ("F", "B", "I", "W")

    def queue(kind: ActionKind) -> Iterator[Action]:
        return (Action(kind, stage, micro_batch) for micro_batch in range(micro_batches))

    return {kind: queue(kind) for kind in kinds}


def _play(rounds: Rounds, queues: Mapping[str, Iterator[Action]], micro_batches: int) -> Rank:
    """Take the rounds' passes from the queues, without those of surplus micro-batches."""
    passes = (next(queues[name]) for times, names in rounds for _ in range(times) for name in names.split())
    return tuple(action for action in passes if action.micro_batch < micro_batches)
