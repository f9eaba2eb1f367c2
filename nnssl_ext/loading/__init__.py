"""Stage 4, data: where to crop, reading crops, and delivering them as batches."""
