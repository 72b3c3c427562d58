"""What conf/ may say: typed, strict, checked before any work starts. Needs no torch."""
