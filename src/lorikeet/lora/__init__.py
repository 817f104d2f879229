"""The bytes and the arithmetic of adapters on one rank: how they are read, where they lie, where they enter the model."""
