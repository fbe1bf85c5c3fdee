"""Distils large language models into small ones with JAX; see README.md."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`distill.Predictor`, imported when it is asked for; `import distill` imports nothing."""
    if name == "Predictor":
        import importlib

        return importlib.import_module("distill.predictor").Predictor
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
