"""Stage 3: raw images become normalised, resampled volumes in a store that is fast to crop from."""
