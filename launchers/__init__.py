"""From a recipe to running processes. Imports no torch, so it runs on a login node."""
