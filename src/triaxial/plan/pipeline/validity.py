"""Can this table run? Checked before any process starts, with an error that names what is wrong."""

from __future__ import annotations

from triaxial import BadInput
from triaxial.plan.layout import Layout
from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.table import Schedule

_WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def check_schedule(schedule: Schedule) -> tuple[int, ...]:
    """Refuse a table that is incomplete, misplaced or would deadlock with receives that block and sends that do not.

    Returns:
        `schedule.peak_activations`: the most activations in flight at each rank.

    Raises:
        BadInput: names the rank, the action and, for an order that cannot run, the dependency it misses.
    """
    _check_placement(schedule)
    _check_each_action(schedule)
    _check_completeness(schedule)
    _check_order(schedule)
    return schedule.peak_activations


def check_fit(schedule: Schedule, layout: Layout, num_micro_batches: int, num_blocks: int) -> None:
    """Refuse a table of one's own that is for another job than the layout's.

    Raises:
        BadInput: another number of pipeline ranks, micro-batches or stages, or more stages than the model's blocks.
    """
    if schedule.num_ranks != layout.pp:
        raise BadInput(f"the schedule's table has {schedule.num_ranks} ranks, but the layout has pp={layout.pp}")
    if schedule.num_micro_batches != num_micro_batches:
        raise BadInput(
            f"the schedule's table has {schedule.num_micro_batches} micro-batches, but a step of this layout and "
            f"global batch has {num_micro_batches}"
        )
    if layout.cut and len(layout.cut) != schedule.num_stages:
        raise BadInput(f"the layout's cut is of {len(layout.cut)} stages, but the table has {schedule.num_stages}")
    if schedule.num_stages > num_blocks:
        raise BadInput(
            f"the schedule's table has {schedule.num_stages} stages, more than the model's {num_blocks} blocks "
            "(embedding, layers, head)"
        )


def inputs_of(action: Action, num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """What must be done before `action` starts: all of the groups, where one action of a group is enough."""
    kind, stage, micro_batch = action
    if kind == "F":
        return () if stage == 0 else ((Action("F", stage - 1, micro_batch),),)
    if kind == "W":
        return ((Action("I", stage, micro_batch),),)
    own = (Action("F", stage, micro_batch),)
    if stage == num_stages - 1:
        return (own,)
    return own, (Action("B", stage + 1, micro_batch), Action("I", stage + 1, micro_batch))


def _check_placement(schedule: Schedule) -> None:
    if schedule.num_micro_batches < 1:
        raise BadInput(f"schedule: needs at least 1 micro-batch, not {schedule.num_micro_batches}")
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < schedule.num_ranks:
            raise BadInput(
                f"schedule: stage {stage} is placed on rank {rank}, but there are {schedule.num_ranks} ranks"
            )
    for rank in range(schedule.num_ranks):
        if rank not in schedule.placement:
            raise BadInput(f"schedule: rank {rank} holds no stage; give it one in placement")
    if not schedule.placement:
        raise BadInput("schedule: there is no stage; give at least one in placement")


def _check_each_action(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.ranks):
        seen: set[Action] = set()
        for action in actions:
            if not 0 <= action.stage < schedule.num_stages:
                raise BadInput(f"rank {rank}: {_name(action)}: there are only {schedule.num_stages} stages")
            if not 0 <= action.micro_batch < schedule.num_micro_batches:
                raise BadInput(
                    f"rank {rank}: {_name(action)}: there are only {schedule.num_micro_batches} micro-batches"
                )
            if (home := schedule.placement[action.stage]) != rank:
                raise BadInput(f"rank {rank}: {_name(action)} belongs to rank {home}, which holds stage {action.stage}")
            if action in seen:
                raise BadInput(f"rank {rank}: {_name(action)} is there twice")
            seen.add(action)


def _check_completeness(schedule: Schedule) -> None:
    done = [set(actions) for actions in schedule.ranks]
    for stage, rank in enumerate(schedule.placement):
        for micro_batch in range(schedule.num_micro_batches):
            forward, whole, of_input, of_weight = (Action(kind, stage, micro_batch) for kind in ("F", "B", "I", "W"))
            if forward not in done[rank]:
                raise BadInput(f"rank {rank}: {_name(forward)} is missing")
            if whole in done[rank]:
                for part in (of_input, of_weight):
                    if part in done[rank]:
                        raise BadInput(f"rank {rank}: {_name(part)} repeats a part of {_name(whole)}; keep one of them")
                continue
            if of_input not in done[rank] and of_weight not in done[rank]:
                raise BadInput(f"rank {rank}: {_name(whole)} is missing")
            for part in (of_input, of_weight):
                if part not in done[rank]:
                    raise BadInput(f"rank {rank}: {_name(part)} is missing")


def _check_order(schedule: Schedule) -> None:
    """Run the table without a clock: every rank goes on until an input is missing, and once more when it arrives."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    waiting: dict[Action, int] = {}  # missing action: rank that waits for it (a single rank consumes it)
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        actions = schedule.ranks[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            missing = _missing_input(action, done, schedule.num_stages)
            if missing:
                for alternative in missing:
                    waiting[alternative] = rank
                break
            done.add(action)
            position[rank] += 1
            if action in waiting:
                runnable.append(waiting.pop(action))
    if any(position[rank] < len(actions) for rank, actions in enumerate(schedule.ranks)):
        raise BadInput(_describe_deadlock(schedule, done, position))


def _missing_input(action: Action, done: set[Action], num_stages: int) -> tuple[Action, ...]:
    """The first group of inputs of which none is done, or nothing."""
    for group in inputs_of(action, num_stages):
        if done.isdisjoint(group):
            return group
    return ()


def _describe_deadlock(schedule: Schedule, done: set[Action], position: list[int]) -> str:
    """Follow who waits for whom until a rank repeats, and say the circle."""
    rank = next(r for r, actions in enumerate(schedule.ranks) if position[r] < len(actions))
    circle: list[str] = []
    visited: list[int] = []
    while rank not in visited:
        visited.append(rank)
        action = schedule.ranks[rank][position[rank]]
        missing = _missing_input(action, done, schedule.num_stages)
        home = schedule.placement[missing[0].stage]
        needed = next(need for need in missing if need in schedule.ranks[home])
        circle.append(f"rank {rank}: {_name(action)} needs {_name(needed)}, which rank {home} does later")
        rank = home
    return "the schedule would deadlock: " + "; ".join(circle[visited.index(rank) :])


def _name(action: Action) -> str:
    return f"{action} ({_WORDS[action.kind]} of micro-batch {action.micro_batch} on stage {action.stage})"
