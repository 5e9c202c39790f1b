#!/usr/bin/env bash
# Tests and benchmarks on the GPU of this machine. Exits 2 where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

python - <<'PYTHON' || exit 2
import sys
import torch

if not torch.cuda.is_available():
    why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    sys.exit(f"make gpu: no GPU here ({why}, torch {torch.__version__}); nothing was run")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON

python -m pytest -q -m gpu tests
