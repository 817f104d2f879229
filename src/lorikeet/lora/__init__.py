"""Adapters from name to kernel operand: what they are, where they are, and where they enter the model."""
