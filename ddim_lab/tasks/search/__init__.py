"""The search for timesteps: smooth warps of a spacing, scored on the model."""
