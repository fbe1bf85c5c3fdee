"""A script of its own process: torch's `pytorch_model.bin` -> safetensors.

    python -P distill/formats/torch_bin.py FOLDER A.bin ...     # writes FOLDER/A.bin.safetensors

A `.bin` is a pickle. `weights_only` keeps torch from running what is in it; that this is not the
process that trains, and that torch and TensorFlow never meet in one, comes on top. It imports
nothing of distill. On failure the last line of stderr says why.
"""

import os
import sys
import zipfile

import torch
from safetensors.torch import save_file

# Before 2.6 `weights_only` could be made to run code (CVE-2025-32434), before 2.10 to corrupt
# memory (CVE-2026-24747).
OLDEST_TORCH = (2, 10)


def main(folder: str, *sources: str) -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        sys.exit(f"torch {torch.__version__} is too old to open a .bin safely; 2.10 is needed")
    for source in sources:
        target = os.path.join(folder, f"{os.path.basename(source)}.safetensors")
        try:
            # torch before 1.6 wrote no zip files, and those cannot be mapped.
            mmap = zipfile.is_zipfile(source)
            content = torch.load(source, weights_only=True, mmap=mmap, map_location="cpu")
            save_file(_independent(content), target, metadata={"format": "pt"})
        except Exception as error:  # torch raises what its parsers raise
            reason = " ".join(str(error).split())
            # Around this, torch tells how to run what is in the file.
            reason = reason.rpartition("WeightsUnpickler error: ")[2]
            reason = reason.partition(" was not an allowed")[0].partition(" Check the doc")[0]
            sys.exit(f"{source} cannot be opened: {type(error).__name__}: {reason[:300]}")


def _independent(content: object) -> dict[str, torch.Tensor]:
    """Returns tensors that share no memory, as tied weights do; safetensors wants that."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds no dict but {type(content).__name__}")
    tensors, storages = {}, set()
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{str(name)[:100]!r} is no tensor but {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name[:100]!r} is no dense tensor but {tensor.layout}")
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors


if __name__ == "__main__":
    main(*sys.argv[1:])
