"""Plain data shared by every process: requests, sequences, plans, messages. No torch here."""
