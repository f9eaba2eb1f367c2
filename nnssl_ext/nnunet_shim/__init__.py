"""The folder that `nnUNet_extTrainer` points at: re-exports that nnU-Net finds by the trainer's name."""
