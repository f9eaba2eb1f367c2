"""What a raw dataset consists of, how it is split by patient, and whether its files are sound."""
