"""Layers are replaced inside a model, and what holds the old ones follows."""
