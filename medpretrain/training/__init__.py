"""The loop, checkpoints, schedules."""
