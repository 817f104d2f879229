"""What runs in the next step. Plain Python over ints, no torch."""
