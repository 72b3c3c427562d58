"""What a job measures; one module a task (conf group `task`)."""
