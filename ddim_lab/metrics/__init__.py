"""What is measured of a cell: quality, speed and determinism.

    base            what a metric of samples is; the metrics are the files of of_samples, one each
    quality         all metrics that are switched on, in one pass over the samples
    frechet, distances, influence                           what they compute with
    features        what a feature network is; the networks are the files of networks, one each
    extractor, classifier (trained by training), inception  what they load
    inception_variants, torchvision_inception               how others take Inception, and whose it is
    references      real images as these features see them; their sums are in statistics
    estimates       standard errors
    significance    what is more than its error; in sequential where that was looked at before
    speed           time, memory and forwards
    determinism     repeats, noise seeds, the hash of the images

Values never stand alone: network, reference and N travel with them.
"""
