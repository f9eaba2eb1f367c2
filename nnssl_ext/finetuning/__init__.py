"""Fine-tuning in nnU-Net: plans and weights for its stock trainer, and a trainer with schedules for pretraining."""
