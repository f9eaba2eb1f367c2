"""What pretrained features are good for without fine-tuning."""
