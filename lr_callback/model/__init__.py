"""A model is looked at and run, and nothing of it is changed."""
