"""The health of a run: who hangs, who is slow, when to leave, and what is said last."""
