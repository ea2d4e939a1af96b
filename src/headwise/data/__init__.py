"""Data to train on: embedded defaults, files, Hugging Face datasets."""
