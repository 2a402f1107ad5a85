"""The result of a comparison as a sentence."""

from dataclasses import dataclass

from workbench.evaluation.statistics import LEVEL, MIN_P, Difference

TARGET = 0.5  # points: the difference for which a verdict names the seeds needed
LARGE = 1.0  # points: from here on a difference that is not significant is called large


@dataclass(frozen=True)
class Verdict:
    """One recipe against the baseline; as text it is one sentence."""

    name: str
    baseline: str
    difference: Difference
    unfinished: bool = False  # whether a run of either is unfinished

    @property
    def significant(self) -> bool:
        return self.difference.adjusted < 1 - LEVEL

    def __str__(self) -> str:
        prefix = "preliminary, not all runs are finished: " if self.unfinished else ""
        return prefix + self._sentence()

    def _sentence(self) -> str:
        d, single = self.difference, self.difference.seeds == (1, 1)
        pair, bound = f"{self.name} and {self.baseline}", max(-d.low, d.high)
        direction = f"{self.name} is {'worse' if d.points < 0 else 'better'} than {self.baseline}"
        direction += f" by {abs(d.points):.2f} points"
        if self.significant:
            only = "; this holds for these two runs, train more seeds to compare the recipes"
            return f"{direction} ({self._evidence()}){only if single else ''}"
        if abs(d.points) >= LARGE:
            text = f"a large but not significant difference between {pair}: {d.points:+.2f} points"
        elif bound < LARGE:
            text = f"{pair} are within {bound:.2f} points: {d.points:+.2f}"
        else:
            text = f"undecided between {pair}: {d.points:+.2f} points"
        text += f" ({self._evidence()}); a difference of {d.detectable:.2f} would have shown"
        if single:
            return f"{text}; other seeds may differ"
        needed = d.seeds_needed(TARGET)
        if needed is None:
            return f"{text}; more seeds cannot show {TARGET} points, only more images can"
        more = f"; {needed} seeds of each would show {TARGET} points"
        return text + more if d.detectable > TARGET else text

    def _evidence(self) -> str:
        """Interval, p, seeds and images; "worse by" turns the signs of the interval round."""
        d, (theirs, ours) = self.difference, self.difference.seeds
        turned = d.points < 0 and self.significant
        low, high = (-d.high, -d.low) if turned else (d.low, d.high)
        text = f"{100 * LEVEL:.0f} % interval {low:.2f} to {high:.2f}, p {p_text(d.p)}"
        if d.comparisons > 1:
            less = "< " if MIN_P == d.p < d.adjusted else ""
            text += f", {less}{p_text(d.adjusted)} adjusted for {d.comparisons} comparisons"
        if ours == theirs == 1:
            return f"{text}, one run each on {d.images:,} images"
        seeds = f"{ours} seed{'s' * (ours > 1)} of {self.name} and {theirs} of {self.baseline}"
        seeds = f"{ours} seeds each" if ours == theirs else seeds
        return f"{text}, {seeds}, {d.images:,} images"


def p_text(p: float) -> str:
    """A p value with one or two digits; "< 1e-16" for those below the precision of a double."""
    if p <= MIN_P:
        return f"< {p:.1g}"
    if 0.045 <= p < 0.055:  # not rounded to the other side of 0.05
        return f"{p:.3g}"
    return f"{p:.1g}" if p < 0.095 else f"{p:.2f}"
