"""What is measured of a cell: quality (frechet), speed, determinism."""
