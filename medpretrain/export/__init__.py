"""A backbone that others can load."""
