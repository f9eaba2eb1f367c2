"""The self-supervised methods: one file each, a task plus its recipe."""
