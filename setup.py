"""Metadata, dependencies and extras; settings of tools are in pyproject.toml.

Lower bounds are the oldest versions with what is used here; upper bounds end the range that was
tested. `constraints.txt` holds the exact versions that the tests ran with.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "distill/__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)
README = ROOT / "README.md"

setuptools.setup(
    name="distill-step-by-step",
    version=VERSION,
    description="Distils large language models into small ones with JAX",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(
        include=["distill", "distill.*", "tasks", "gin_configs", "gin_configs.t5x"]
    ),
    package_data={
        "gin_configs": ["**/*.gin", "studies/**/*.toml"],
        "distill.report": ["*.html", "*.css", "*.js"],
        "distill.teacher": ["prompts/**/*.toml"],
    },
    install_requires=[
        # Python 3.11 resolves to jax 0.10 and flax 0.12.8, 3.12 to the newest.
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorstore>=0.1.84,<0.2",
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.3,<0.9",
        "numpy>=2.0,<3",
        "etils[epath]>=1.15,<2",
        "absl-py>=2.3,<3",
        "gin-config>=0.5.0,<0.6",  # its parser is used directly
        "ml_dtypes>=0.5,<0.7",
        "msgpack>=1.1,<2",
        "safetensors>=0.8,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "tqdm>=4.67,<5",
        "tensorboardX>=2.6.4,<3",
        "matplotlib>=3.10,<4",
        "sacrebleu>=2.4,<3",  # chrF; imported only where rationales are scored
        # The data edge. Neither training from a warm cache nor evaluation imports them.
        "seqio>=0.0.20,<0.1",
        "tensorflow>=2.21,<2.22",  # tensorflow-text, a hard import of seqio, pins it
        "tensorflow-datasets>=4.9.10,<5",
    ],
    extras_require={
        "test": [
            "pytest>=8.4,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "openai>=3.54,<4",
        ],
        # A teacher behind an OpenAI-compatible endpoint.
        "teacher": ["openai>=3.54,<4"],
        # Compares logits and exports with Hugging Face's T5.
        "parity": ["transformers>=5.20,<6", "torch==2.13.0"],
        # Checkpoints by their id on the Hugging Face hub.
        "hub": ["huggingface_hub>=1.0,<3"],
        # The report in Chromium: its tests and the pictures in docs/report.md.
        "browser": ["playwright>=1.50,<2"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]", "gcsfs>=2025.3"],
        # gs:// paths.
        "gcs": ["gcsfs>=2025.3"],
        # What T5X imports beyond the above, for distill/t5x_adapter.py. T5X and AirIO are not on an
        # index, and the jestimator that is does not import under jax 0.10. Tested (docs/t5x.md):
        #   https://github.com/google-research/t5x @ cc342d419ec3e3e9c4bf1df33c82330cafdc1e16
        #   https://github.com/google/airio @ 69897df7d9a427b947a9f7bb4164c7782b43e601
        #   https://github.com/google-research/jestimator @ 326824a477feef6d92e6f44175000907a72899ca
        "t5x": [
            "clu>=0.0.12,<0.1",
            "cached_property>=2.0.1,<3",
            "fiddle>=0.3.1,<0.4",
            "tensorboard>=2.21,<3",
        ],
        # Compiles for TPU topologies on a machine without a TPU.
        "tpu-aot": ["libtpu>=0.0.51,<0.1"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
