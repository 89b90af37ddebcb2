"""Techniques: one folder per seam, one file per technique."""
