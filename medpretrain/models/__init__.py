"""Backbones, heads, and what is around them."""
