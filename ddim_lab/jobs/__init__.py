"""A sweep from its command to its cells: what is planned, what it costs, how each job runs and is told."""
