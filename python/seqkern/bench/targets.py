"""What a row is to reach, and whether it did."""

from collections.abc import Mapping
from dataclasses import dataclass

BEST = "best"


@dataclass(frozen=True)
class Target:
    """Reached with a ratio of times over a peer or, where ``or_peak`` is given, with a share of the FMA peak.

    ``noted_peak`` is a share that is reported beside a missed ratio and does not meet the target: where a peer itself
    runs near the peak, the ratio is out of anyone's reach.
    """

    ratio: float
    over: str = BEST  #: a peer's name, or the best of all
    or_peak: float | None = None
    noted_peak: float | None = None

    def __str__(self) -> str:
        share = f" or {self.or_peak:.0%} of peak" if self.or_peak else ""
        return f"{self.ratio:g}x {'the best peer' if self.over == BEST else self.over}{share}"


def best_ratio(ratios: Mapping[str, float]) -> float | None:
    """The ratio over the fastest peer, which is the smallest."""
    return min(ratios.values(), default=None)


def judge(target: Target | None, ratios: Mapping[str, float], share: float | None) -> str:
    """``met``, ``missed``, with the share of peak where it counts, or ``-`` where nothing was to be reached.

    >>> judge(Target(1.05, or_peak=0.83), {"torch": 2.0, "onnxruntime": 1.01}, share=0.85)
    'met, 85% of peak'
    >>> judge(Target(2.5, "torch", noted_peak=0.8), {"torch": 1.9}, share=0.82)
    'missed, 82% of peak'
    """
    if target is None:
        return "-"
    ratio = best_ratio(ratios) if target.over == BEST else ratios.get(target.over)
    if ratio is not None and ratio >= target.ratio:
        return "met"
    if share is not None and target.or_peak is not None and share >= target.or_peak:
        return f"met, {share:.0%} of peak"
    if ratio is None:
        return "-"
    if share is not None and target.noted_peak is not None and share >= target.noted_peak:
        return f"missed, {share:.0%} of peak"
    return "missed"
