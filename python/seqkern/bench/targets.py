"""What a row is to reach, and whether it did."""

from collections.abc import Mapping
from dataclasses import dataclass

BEST = "best"
PLAIN = "plain"  # seqkern without the row's option: a yardstick, no peer


@dataclass(frozen=True)
class Target:
    """Reached with a ratio of times over a peer or, where ``or_peak`` is given, with a share of the FMA peak.

    ``and_peak`` is a share that must be reached as well, ``read`` the share of the bandwidth that must be.
    ``and_best`` is a ratio over the best peer that must be reached beside the one over another subject.
    ``noted_peak`` is a share that is reported beside a missed ratio and does not meet the target: where a peer itself
    runs near the peak, the ratio is out of anyone's reach.
    """

    ratio: float | None
    over: str = BEST  #: a peer's name, the best of all, or `PLAIN`
    or_peak: float | None = None
    noted_peak: float | None = None
    and_peak: float | None = None
    read: float | None = None
    and_best: float | None = None

    def __str__(self) -> str:
        said = []
        if self.over == PLAIN and self.ratio is not None:
            said.append(f"{1 / self.ratio:.3g}x the plain time at most")
        elif self.ratio is not None:
            said.append(f"{self.ratio:g}x {'the best peer' if self.over == BEST else self.over}")
        if self.and_best is not None:
            said.append(f"{self.and_best:g}x the best peer")
        if self.and_peak is not None:
            said.append(f"{self.and_peak:.0%} of peak")
        if self.read is not None:
            said.append(f"{self.read:.0%} of bandwidth")
        share = f" or {self.or_peak:.0%} of peak" if self.or_peak else ""
        return f"{' and '.join(said)}{share}"


def best_ratio(ratios: Mapping[str, float]) -> float | None:
    """The ratio over the fastest peer, which is the smallest."""
    return min((value for name, value in ratios.items() if name != PLAIN), default=None)


def judge(
    target: Target | None, ratios: Mapping[str, float], share: float | None, read: float | None = None
) -> str:
    """``met``, ``missed``, with the share of peak where it counts, or ``-`` where nothing was to be reached.

    ``share`` is the one of the FMA peak, ``read`` that of the bandwidth; None where unknown.

    >>> judge(Target(1.05, or_peak=0.83), {"torch": 2.0, "onnxruntime": 1.01}, share=0.85)
    'met, 85% of peak'
    >>> judge(Target(2.5, "torch", noted_peak=0.8), {"torch": 1.9}, share=0.82)
    'missed, 82% of peak'
    >>> judge(Target(2.0, "torch", and_peak=0.62), {"torch": 2.1}, share=0.5)
    'missed, 50% of peak'
    >>> judge(Target(None, read=0.8), {}, share=None, read=0.9)
    'met'
    """
    if target is None:
        return "-"
    ratio = best_ratio(ratios) if target.over == BEST else ratios.get(target.over)
    pairs = [
        (target.ratio, ratio),
        (target.and_best, best_ratio(ratios)),
        (target.and_peak, share),
        (target.read, read),
    ]
    wanted = [(want, got) for want, got in pairs if want is not None]
    if all(got is not None and got >= want for want, got in wanted):
        return "met"
    if share is not None and target.or_peak is not None and share >= target.or_peak:
        return f"met, {share:.0%} of peak"
    if any(got is None for _, got in wanted):
        return "-"
    noted = target.noted_peak is not None and share is not None and share >= target.noted_peak
    if share is not None and (noted or target.and_peak is not None):
        return f"missed, {share:.0%} of peak"
    return "missed"
