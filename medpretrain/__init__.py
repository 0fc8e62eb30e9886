"""Large-scale pretraining for medical images: from shards to an evaluated, exported backbone."""

__version__ = "0.1.0"
