"""From noise and a prompt to a picture: schedules, solvers, text, the pipeline."""
