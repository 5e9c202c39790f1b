"""Triton kernels of seqkern. Imports torch, triton and itself, never another part of seqkern.

The folder lies at the top of the repository and is installed as ``seqkern.kernels``. Another published package
is imported as ``kernels``: a run from the repository's root must not find this one in its place.
"""

if __name__ != "seqkern.kernels":
    raise ImportError(
        f"this folder is the package seqkern.kernels, but it was imported as {__name__!r}: "
        "install seqkern (pip install -e .) and import seqkern.kernels; if you meant the package 'kernels', "
        "start Python outside the repository's root"
    )
