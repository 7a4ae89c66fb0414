"""The bench: layouts run for real, one after the other, beside what the planner expects of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from triaxial import BadInput, Ended, NoAnswer
from triaxial.plan.layout import Layout
from triaxial.plan.validation.accuracy import kendall_tau


class Prediction(Protocol):
    """What the planner expects of a layout."""

    @property
    def fits(self) -> bool: ...
    @property
    def memory_gib(self) -> dict[str, float]: ...


class Outcome(Protocol):
    """A layout that ran. The seconds are those that layouts are compared by."""

    @property
    def predicted_s(self) -> float: ...
    @property
    def measured_s(self) -> float: ...


Expected = TypeVar("Expected", bound=Prediction)
Found = TypeVar("Found", bound=Outcome)


@dataclass(frozen=True)
class Row(Generic[Expected, Found]):
    """One layout: predicted and measured, or why it did not run."""

    layout: Layout
    predicted: Expected
    comparison: Found | None = None
    failure: str = ""


@dataclass(frozen=True)
class Bench(Generic[Expected, Found]):
    """All layouts of one model and one amount of work."""

    rows: tuple[Row[Expected, Found], ...]

    @property
    def measured(self) -> list[Found]:
        return [row.comparison for row in self.rows if row.comparison]

    @property
    def regret(self) -> float | None:
        """How much slower the layout predicted to be fastest is than the fastest measured one."""
        if not self.measured:
            return None
        chosen = min(self.measured, key=lambda found: found.predicted_s)
        return chosen.measured_s / min(found.measured_s for found in self.measured) - 1

    @property
    def rank_correlation(self) -> float | None:
        """Kendall's tau of predicted and measured seconds; None for fewer than two layouts."""
        if len(self.measured) < 2:
            return None
        return kendall_tau(
            [found.predicted_s for found in self.measured], [found.measured_s for found in self.measured]
        )


def run_layouts(
    layouts: Sequence[Layout],
    predict: Callable[[Layout], Expected],
    run: Callable[[Layout, Expected], Found],
    tell: Callable[[Layout], None],
) -> Bench[Expected, Found]:
    """Price every layout, then run one after the other; one that fails is a row that says why, as is one that needs
    more memory than there is.

    Args:
        tell: called with the layout that starts.

    Raises:
        BadInput: a layout that cannot be priced; then none has run.
        Ended: a signal asked for an end.
    """
    expected = [predict(layout) for layout in layouts]
    rows = []
    for layout, predicted in zip(layouts, expected, strict=True):
        tell(layout)
        try:
            if not predicted.fits:
                raise NoAnswer(f"does not fit: the fullest rank needs {predicted.memory_gib['peak']:.1f} GiB")
            rows.append(Row(layout, predicted, run(layout, predicted)))
        except Ended:
            raise
        except (BadInput, NoAnswer) as error:
            rows.append(Row[Expected, Found](layout, predicted, failure=str(error)))
    return Bench(tuple(rows))


def cuts(ranks: int) -> Iterator[Layout]:
    """Every tp x pp x dp over so many ranks."""
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            yield Layout(tp=tp, pp=pp, dp=ranks // tp // pp)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
