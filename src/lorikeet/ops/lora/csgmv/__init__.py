"""The ``csgmv`` backend: rows grouped by adapter and cut into chunks, so that skewed traffic shares tiles.

Only the tiles differ from the ``triton`` backend; the kernels are the same.
"""
