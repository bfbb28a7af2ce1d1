"""Look inside: tracing of attention, and interventions on it."""
