"""Renews the tables of docs/benchmarks.md and of the README, and the pictures of suites, from their results:
``publish.py [SUITE ...]``. The machine with the newest run comes first.

Without names: of every suite that has results.
"""

import sys

from seqkern.bench.record import ROOT, published
from seqkern.bench.run import publish
from seqkern.bench.suites import SUITES

for suite in sys.argv[1:] or SUITES:
    paths = published(ROOT / "benchmarks" / "results", suite)
    if not paths and not sys.argv[1:]:
        continue
    if not paths:
        sys.exit(f"there are no results of the suite {suite}: run seqkern bench {suite}")
    drawn = publish(paths, suite, ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
    made = ", ".join(each.name for each in drawn) or "no picture (matplotlib is missing)"
    print(f"docs/benchmarks.md, README.md and {made} from {', '.join(each.name for each in paths)}")
