"""The arithmetic of LoRA: one contract (``api``), an oracle (``reference``) and one module per backend."""
