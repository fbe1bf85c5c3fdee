"""Distils large language models into small ones with JAX; see README.md."""

__version__ = "0.1.0"
