"""Everything random that touches voxels: batched, on the training device, for 2 and 3 spatial dimensions."""
