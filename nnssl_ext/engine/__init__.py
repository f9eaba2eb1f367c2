"""The training engine: it runs any pretext task and knows none."""
