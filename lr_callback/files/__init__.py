"""A model's structure and weights in files, read and written."""
