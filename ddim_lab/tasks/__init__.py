"""What a job measures: the file NAME.py holds the class of task=NAME (see `base`); its options are conf/task/NAME.yaml.

base       what a task is, what it is given and what it gives back
walks      the sampling loop, and what tasks share that look at single images
sampling   N images of a cell, measured: what tasks generate and cannot_skip do
pictures   sheets of small images
"""
