"""Training: learning-rate schedules, the original's optimizer, accumulation inside the step, and what a run reports."""
