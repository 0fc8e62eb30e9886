"""One page that shows what runs have come to."""
