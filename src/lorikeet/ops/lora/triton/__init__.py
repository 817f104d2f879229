"""The ``triton`` backend: one segment per sequence. Its kernels serve ``csgmv`` too.

Importing :mod:`.segments` does not import Triton; the other modules do.
"""
