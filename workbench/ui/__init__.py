"""Figures, views of images and widgets of the notebooks."""
