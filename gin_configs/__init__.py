"""Gin files that ship with the project: models (sizes), runs (what to do), objectives."""
