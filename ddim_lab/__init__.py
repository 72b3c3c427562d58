"""ddim_lab: compare diffusion samplers on one trained eps-model."""

__version__ = "0.1.0"
