"""Perceptio: a vision-language model that segments and estimates depth before it answers."""

__version__ = "0.1.0"
