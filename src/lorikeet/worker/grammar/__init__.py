"""Grammars that outputs must obey: checked, compiled, and followed token by token."""
