"""Gin files for T5X's own `python -m t5x.train`; not for `--gin_file` of scripts/ (docs/t5x.md)."""
