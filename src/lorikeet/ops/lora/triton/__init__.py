"""The kernels of the ``triton`` and ``csgmv`` backends, which differ only in how rows are cut into tiles."""
