"""Doors of other libraries, each opened by importing its module here and never by `import seqkern`."""
