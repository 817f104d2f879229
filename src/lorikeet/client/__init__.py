"""What talks to an engine: calls checked and sent, completions followed. No torch here."""
