"""The images that a model is trained on, compared with and held out from."""
