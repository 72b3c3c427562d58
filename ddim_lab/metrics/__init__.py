"""What is measured of a cell: quality, speed and determinism.

    quality         all measures of quality in one pass: frechet, kernel, inception_score, precision_recall
    features        what they compare: those of the classifier (trained by training), of inception, or the pixels
    references      real images as these features see them; their sums are in statistics
    estimates       standard errors
    speed           time, memory and forwards
    determinism     repeats, noise seeds, the hash of the images

Values never stand alone: network, reference and N travel with them.
"""
