"""What a fresh install must do: compute what torch computes, forward and backward, from the wheel's files."""

import sys
import zipfile
from pathlib import Path

import torch

import seqkern
import seqkern.nn
from seqkern.ops import _library

wheel = sys.argv[1]
package = Path(seqkern.__file__).parent
assert package.is_relative_to(sys.prefix), f"seqkern came from {package}, not from the wheel"
assert (package / "kernels/__init__.py").is_file(), "the wheel lacks seqkern.kernels"

names = zipfile.ZipFile(wheel).namelist()
compiled = any(Path(name).name.startswith("_native") for name in names)
assert compiled == (_library.native() is not None), _library.why_missing()

theirs = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True)
ours = seqkern.nn.LSTM(5, 7, num_layers=2, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(11, 3, 5)
for model in (theirs, ours):
    model(x)[0].square().sum().backward()
torch.testing.assert_close(ours(x), theirs(x))
for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-5)
kernels = "compiled kernels" if compiled else "no compiled kernels"
print(f"{Path(wheel).name}: installed, {kernels}, agrees with torch")
