"""What a job measures: one module a task (conf group `task`), each with two functions.

    identity(job)                 the part of a cell's key that is the task's own
    measure(job, folder, work)    measures the cell, and writes its files into `folder`

What `measure` leaves in `work` is there again if it is killed and started anew.
"""
