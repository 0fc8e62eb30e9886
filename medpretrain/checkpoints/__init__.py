"""Checkpoints that are committed or do not exist."""
