"""Losses: pure functions of tensors, one per file."""
