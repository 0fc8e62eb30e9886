"""One file a method: its networks, its loss, what it updates after a step."""
