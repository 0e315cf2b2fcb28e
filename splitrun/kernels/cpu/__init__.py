"""Products of few rows with nf4 and int8 weights at the speed of memory, in C, with the reference in torch.

``source`` is compiled when the package is installed and loaded by `library`; where that failed, everything still runs
through torch. Knows storage and arithmetic, no models.
"""
