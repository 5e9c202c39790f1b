"""Tests of the Triton kernels on a machine without a GPU: `TRITON_INTERPRET=1 pytest tests/triton`."""

import os

# Triton decides when it is imported whether kernels are interpreted, for the whole process.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
