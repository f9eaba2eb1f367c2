"""From a fingerprint and an amount of memory to a plan that nnU-Net reads."""
