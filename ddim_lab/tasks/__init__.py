"""What a job measures; one module a task (conf group `task`), each with a function `measure(job, folder)`."""
