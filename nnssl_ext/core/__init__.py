"""The lowest layer, free of torch: paths, records, registries, randomness, execution and logs."""
