"""The eps-model: trained here, made elsewhere, or exact."""
