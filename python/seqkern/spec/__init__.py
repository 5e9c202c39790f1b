"""The description of every operation in plain, differentiable torch: any dtype, any device, no kernels.

Everything faster in this package is a twin of what stands here and is tested against it.
"""

from seqkern.spec.cells import CELLS, Cell
from seqkern.spec.scan import layer, scan, step

__all__ = ["CELLS", "Cell", "layer", "scan", "step"]
