"""Compiled programs, kept on disk between runs: jax's persistent compilation cache, on by default.

jax's own settings go before ours: JAX_COMPILATION_CACHE_DIR names another folder,
JAX_ENABLE_COMPILATION_CACHE=0 switches the cache off. What we rely on of jax (0.10 to 0.12):

- The key of a program holds the program, the versions, the compiler's options, and the kind of
  device. On a CPU that is its instruction set, so that machines may share the folder.
- An entry that cannot be read is a warning and a compilation. zlib finds damage; a damaged entry is
  never replaced, so that the warning stays until the file is deleted.
- An entry is code that will be run: whoever can write to the folder can run code here.
"""

import logging
import os
import pathlib

FOLDER = "programs"
# Above this the oldest are deleted at the next start. The T5 1.1 small student needs 1.3 MB.
MAX_BYTES = 2 << 30
# Programs that compile faster are as fast to compile as to load.
MIN_SECONDS = 0.1


def keep_programs(cache_dir: str | os.PathLike) -> pathlib.Path | None:
    """Makes jax keep compiled programs in `cache_dir`/programs, unless the user has decided.

    To be called before the first program is compiled. A folder that cannot be written to is no
    error: programs are then compiled anew. Does nothing where several processes are one run: only
    the first one writes, and where the others do not see what it wrote, they would compile a
    program that it only loads, while GPU compilers wait for each other. With a folder that all of
    them share, set JAX_COMPILATION_CACHE_DIR.

    Args:
      cache_dir: the folder for everything that can be made again.

    Returns:
      The folder, or None where this function has set none.
    """
    import jax  # here: commands that only check a configuration do without it

    from distill import cluster

    decided = jax.config.jax_compilation_cache_dir is not None
    if decided or not jax.config.jax_enable_compilation_cache or cluster.is_several():
        return None
    folder = pathlib.Path(cache_dir).expanduser() / FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
        _delete_oldest(folder, MAX_BYTES)
    except OSError as error:
        logging.warning("Compiled programs are not kept: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


def _delete_oldest(folder: pathlib.Path, limit: int) -> None:
    """Deletes the oldest files until the rest is within `limit` bytes.

    jax's own limit (jax_compilation_cache_max_size) needs another package, locks the folder for
    every read, and before 0.12 writes nothing more after a process was killed between two files.
    """
    total = 0
    files = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
        total += stat.st_size
        if total > limit:
            path.unlink(missing_ok=True)
