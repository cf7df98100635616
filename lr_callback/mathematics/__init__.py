"""Tensors only: weights as matrices, their spectra, and errors of what truncation leaves over."""
