"""From a recipe to running processes: torchrun, DeepSpeed, SLURM, Kubernetes.

Imports no torch, so it runs on a login node.
"""
