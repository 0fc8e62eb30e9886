"""From pictures to shards: needs no GPU and imports no torch, so it runs on a hospital workstation."""
