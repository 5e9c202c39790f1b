"""Fused kernels for PyTorch sequence models, as drop-in modules."""

from seqkern._version import __version__

__all__ = ["__version__"]
