"""One recipe that expands to many runs."""
