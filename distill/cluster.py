"""Several processes as one run: joining them, waiting for all, and stopping at one step.

jax is imported inside the functions: commands that only check a configuration do without it. Of
its internals (`jax._src`) this module uses what has no public name: a barrier that is no
collective, the number of processes before there is a backend, and whether this is a TPU host.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# sysexits.h: EX_UNAVAILABLE. The other processes did not come; starting again may help.
EXIT_UNREACHABLE = 69
INITIALIZATION_TIMEOUT = 300  # seconds
# jax's own 100 s are long for a pod that is preempted often. The heartbeat comes from a thread of
# its own in C++, so that neither compiling nor a slow disk delays it.
HEARTBEAT_TIMEOUT = 60  # seconds
_BARRIER_TIMEOUT = 30 * 24 * 3600  # seconds; a process that dies ends the wait much sooner

# One of these is there wherever a launcher knows the other processes, or that there are none.
_MANAGED = {"SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"}

_barriers = itertools.count()
_agreements = itertools.count()
_notify_jax: Callable[[int], None] | None = None  # jax's own handler of SIGTERM


def start(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    initialization_timeout: int = INITIALIZATION_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Joins the other processes of the run, if there are any.

    Must come before anything asks JAX for its devices. Without arguments the environment decides
    (see `environment`); where it names no other processes nothing is started.

    Args:
      address: host:port of process 0; "auto": what the environment says, and an error on a machine
        that has none; "none": this process is alone, whatever the environment says.
      count: processes.
      index: of this one, from 0.
      initialization_timeout: seconds to wait for the others. When they are over the process ends
        with EXIT_UNREACHABLE.
      heartbeat_timeout: seconds of silence after which a process counts as dead.

    Raises:
      ValueError: the arguments are incomplete or out of range, or "auto" finds nothing.
    """
    import jax

    given = {"--coordinator_address": address, "--process_count": count, "--process_index": index}
    settings: dict = {}
    if address in (None, "auto", "none"):
        if count is not None or index is not None:
            raise ValueError(_incomplete(given))
        name = None if address == "none" else environment(os.environ, _is_tpu_host())
        if name is None:
            if address == "auto" and not (_is_tpu_host() or _MANAGED & os.environ.keys()):
                raise ValueError(
                    "--coordinator_address=auto: nothing here says which processes there are "
                    "(a TPU host, SLURM, Open MPI or an indexed Kubernetes job would). Give "
                    "host:port, --process_count and --process_index."
                )
            return
        settings = _settings_of(name, os.environ)
        who, where = f"This process ({name})", "the coordinator that the environment names"
    else:
        if count is None or index is None:
            raise ValueError(_incomplete(given))
        if not re.fullmatch(r".+:[0-9]+", address):
            raise ValueError(f"--coordinator_address={address} is not host:port")
        if count < 1:
            raise ValueError(f"--process_count={count} must be at least 1")
        if not 0 <= index < count:
            raise ValueError(f"--process_index={index} is not in 0..{count - 1}")
        settings = dict(coordinator_address=address, num_processes=count, process_id=index)
        # The flags are complete: nothing is to be looked up, nor devices to be divided.
        settings["cluster_detection_method"] = "deactivate"
        who, where = f"Process {index} of {count}", address
    if _joined() is not None:  # a second run in one process
        return

    def give_up() -> None:
        print(
            f"Error: {who} waited {initialization_timeout} s at {where}, and not all processes "
            "came. Are all started, with the same address and number, and is the port of process 0 "
            "open to them? (--initialization_timeout is how long to wait.)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(EXIT_UNREACHABLE)

    # When its own limit is over jax (0.10 to 0.12) aborts in C++ with a stack trace.
    timer = threading.Timer(initialization_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=initialization_timeout + 30,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    finally:
        timer.cancel()
    _take_over_sigterm()


def _incomplete(given: Mapping[str, object]) -> str:
    lacking = [flag for flag, value in given.items() if value is None]
    if not lacking:  # "auto" or "none" with a number
        return (
            "--process_count and --process_index need --coordinator_address=host:port, not "
            f"{given['--coordinator_address']!r}"
        )
    there = [flag for flag, value in given.items() if value is not None]
    return (
        f"{' and '.join(there)} without {' and '.join(lacking)}: give all three, or none of them "
        "where the environment knows (TPU pods, SLURM, Open MPI)."
    )


def environment(env: Mapping[str, str], is_tpu_host: bool = False) -> str | None:
    """Says what started this process beside others; None where it is alone.

    By variables alone, so that on a laptop nothing is started and nothing asked over the network:
    jax's own detection takes part only where this names something. It would also take an
    interactive shell of SLURM, or any pod of Kubernetes, for a member of a run, and wait.

    Returns:
      `ompi`, `mpi4py` (Open MPI 5), `slurm`, `tpu` or `k8s`.
    """
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi" if "OMPI_MCA_orte_hnp_uri" in env else "mpi4py"
    # srun sets the step's variables; a batch script outside srun has only those of the job.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if tasks > 1 and {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= env.keys():
        return "slurm"
    platforms = env.get("JAX_PLATFORMS")
    if is_tpu_host and (not platforms or "tpu" in platforms):  # else a test on the host's CPU
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
        if hosts is not None:
            return "tpu" if "," in hosts or slices > 1 else None
        # A TPU VM has to ask its metadata server. One that is told not to stands alone.
        asks = "TPU_PROCESS_ADDRESSES_PATH" in env or "TPU_SKIP_MDS_QUERY" not in env
        return "tpu" if asks else None
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "k8s"
    return None


def _settings_of(name: str, env: Mapping[str, str]) -> dict:
    """Arguments of `jax.distributed.initialize` for an environment, beside what it detects."""
    if name == "mpi4py":
        if importlib.util.find_spec("mpi4py") is None:
            raise ValueError(
                f"Open MPI started {env['OMPI_COMM_WORLD_SIZE']} processes but its version 5 does "
                "not say where the first one is. Install mpi4py, or give "
                "--coordinator_address=HOST:PORT --process_count=$OMPI_COMM_WORLD_SIZE "
                "--process_index=$OMPI_COMM_WORLD_RANK."
            )
        return {"cluster_detection_method": "mpi4py"}
    if name == "k8s" and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            "This is one of several pods of an indexed Kubernetes job. Install the kubernetes "
            "package, or give --coordinator_address=HOST:PORT --process_count=... "
            "--process_index=$JOB_COMPLETION_INDEX. (--coordinator_address=none: run alone.)"
        )
    # jax takes one GPU for each task of SLURM. With one task on each node that would be the first
    # GPU of the node, and the others idle.
    alone = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if name == "slurm" and alone and gpus.isdigit() and "JAX_LOCAL_DEVICE_IDS" not in env:
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


def _is_tpu_host() -> bool:
    from jax._src import cloud_tpu_init  # found by the ids on the PCI bus when jax was imported

    return cloud_tpu_init.running_in_cloud_tpu_vm


def wait_for_all(what: str) -> None:
    """Waits until every process has come here.

    Before the first collective, and wherever one process may be minutes behind: unlike a
    collective this has no time limit of its own (Gloo's, on CPUs, is 30 s for the first one).

    Args:
      what: a name of this place, for the message of an error.
    """
    if is_several():
        name = f"{what} ({next(_barriers)})"  # a name serves once
        _joined().client.wait_at_barrier(name, _BARRIER_TIMEOUT * 1000)


def agreed(value: Any) -> Any:
    """Returns what the first process gives, on all of them: a value that JSON can hold.

    For what each would see at its own time, such as the files of a folder.
    """
    if not is_several():
        return value
    client, key = _joined().client, f"agreed/{next(_agreements)}"
    if is_first():
        client.key_value_set(key, json.dumps(value))
    return json.loads(client.blocking_key_value_get(key, _BARRIER_TIMEOUT * 1000))


def together(do: Callable[[], T]) -> T:
    """Returns what `do` returns, on all processes; where it fails on one, it fails on all.

    For what each has to do by itself and might not be able to, such as reading a file: no process
    goes on and waits in a collective for one that does not come.

    Raises:
      ValueError, FileNotFoundError: as `do` raised it, here or on the first process that did. Any
        other exception is to end its process, and with it the run.
    """
    if not is_several():
        return do()
    result, error = None, None
    try:
        result = do()
    except (ValueError, FileNotFoundError) as caught:  # raised below, once the others know
        error = caught
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    state, key = _joined(), f"together/{next(_agreements)}"
    said = None if error is None else [kind.__name__, str(error)]
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(said))
    heard = [
        json.loads(state.client.blocking_key_value_get(f"{key}/{i}", _BARRIER_TIMEOUT * 1000))
        for i in range(state.num_processes)
    ]
    if error is not None:
        raise error
    for i, other in enumerate(heard):
        if other is not None:
            name, message = other
            raise {"FileNotFoundError": FileNotFoundError}.get(name, ValueError)(
                f"process {i}: {message}"
            )
    return result


def is_several() -> bool:
    """Whether this process is one of several; starts no backend, as jax.process_count() would."""
    return _joined() is not None and _joined().num_processes > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints; starts no backend either."""
    return _joined() is None or _joined().process_id == 0


def _joined():
    """jax's state of the distributed system; None where that was not started."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state if distributed.global_state.client is not None else None


def abandon(code: int) -> None:
    """Ends this process at once where it is one of several; else returns.

    After an error: jax's own ending waits up to five minutes for the others, who wait for us.
    """
    if is_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields `stops(step)`: whether to save and stop after this step, the same on all processes.

    SIGTERM to any process is the reason. A second one ends that process at once. Every process has
    to ask after every step.
    """
    from jax.experimental import multihost_utils

    event = threading.Event()

    def stops(step: int) -> bool:
        if _joined() is not None:
            return multihost_utils.reached_preemption_sync_point(step)
        return event.is_set()

    def handle(signum, frame):
        del frame
        event.set()
        if _notify_jax is not None:
            _notify_jax(signum)
        signal.signal(signum, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield stops  # signals can only be handled in the main thread
        return
    if _notify_jax is None:
        _take_over_sigterm()  # somebody else has called jax.distributed.initialize
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield stops
    finally:
        signal.signal(signal.SIGTERM, previous)


def _take_over_sigterm() -> None:
    """Gives SIGTERM its meaning back, and keeps jax's handler to be called from ours.

    jax.distributed.initialize puts a handler in place, in C and unseen by Python, that only takes
    a note. Nothing would then end a process that never asks for the note (an evaluation), and a
    second SIGTERM would end none; a handler of Python in its place would leave jax unaware.
    """
    global _notify_jax
    if _joined() is None or _joined().preemption_sync_manager is None:
        return  # the latter is switched off by JAX_ENABLE_PREEMPTION_SERVICE=0
    if threading.current_thread() is not threading.main_thread():
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    jaxs = libc.signal(signal.SIGTERM, None)  # None: SIG_DFL
    if jaxs:
        _notify_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(jaxs)
    before = signal.getsignal(signal.SIGTERM)  # Python's view, from before jax's
    if before is not None:
        signal.signal(signal.SIGTERM, before)
