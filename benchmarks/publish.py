"""Renews the README's tables and the picture of a suite from its newest results: ``publish.py [SUITE ...]``."""

import sys

from seqkern.bench.record import ROOT, newest
from seqkern.bench.rows import SUITES
from seqkern.bench.run import publish

for suite in sys.argv[1:] or SUITES:
    path = newest(ROOT / "benchmarks" / "results", suite)
    if path is None:
        sys.exit(f"there are no results of the suite {suite}: run seqkern bench {suite}")
    picture = publish(path, suite, ROOT / "README.md")
    print(f"README.md and {picture or 'no picture (matplotlib is missing)'} from {path.relative_to(ROOT)}")
