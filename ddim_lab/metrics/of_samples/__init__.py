"""What is measured of samples, one file a metric: its options, what it needs of the samples, and its values."""
