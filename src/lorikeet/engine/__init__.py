"""The loop of an engine, the process around it, and how both are built."""
