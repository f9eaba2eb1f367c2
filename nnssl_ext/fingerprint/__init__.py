"""What a dataset looks like: shapes, spacings and foreground intensities of every case."""
