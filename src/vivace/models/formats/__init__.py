"""Readers of checkpoint files; each checks everything before it trusts anything."""
