"""``python -m seqkern`` is the command ``seqkern``."""

from seqkern.cli import app

if __name__ == "__main__":
    app()
