"""Checkpoints of other code bases: their files read without unpickling, their networks as ones that are known here."""
