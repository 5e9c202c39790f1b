"""Renews the README's tables and the pictures of suites from their newest results: ``publish.py [SUITE ...]``.

Without names: of every suite that has results.
"""

import sys

from seqkern.bench.record import ROOT, newest
from seqkern.bench.run import publish
from seqkern.bench.suites import SUITES

for suite in sys.argv[1:] or SUITES:
    path = newest(ROOT / "benchmarks" / "results", suite)
    if path is None and not sys.argv[1:]:
        continue
    if path is None:
        sys.exit(f"there are no results of the suite {suite}: run seqkern bench {suite}")
    drawn = publish(path, suite, ROOT / "README.md")
    made = ", ".join(each.name for each in drawn) or "no picture (matplotlib is missing)"
    print(f"README.md and {made} from {path.relative_to(ROOT)}")
