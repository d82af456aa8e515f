"""Building the sample set of real images from data that comes inside registry packages."""
