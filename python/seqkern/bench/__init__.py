"""The microbenchmarks, side by side with every peer found on the machine.

A suite is a table of `rows.Row`; what it is timed against stands in `peers.PEERS`. Correctness comes first: a kernel
that fails the tolerance rule of `seqkern.testing` gets no figure.
"""
