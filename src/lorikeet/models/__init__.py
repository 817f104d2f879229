"""The networks: what a checkpoint is (spec), how it is built and loaded, and the decoder that runs it."""
