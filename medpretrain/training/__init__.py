"""The loop, checkpoints, schedules, tracking."""
