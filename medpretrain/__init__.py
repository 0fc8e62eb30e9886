"""Large-scale pretraining for medical images: from shards to an evaluated, exported backbone."""
