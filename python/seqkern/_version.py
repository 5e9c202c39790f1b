"""The version of the package; setup.py, the docs and `seqkern.__version__` read it here."""

__version__ = "0.1.0"
