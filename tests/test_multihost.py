"""Runs of several processes, and their supervisor; real processes on CPUs, joined by Gloo."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_evaluate import save

from distill import checkpoints, cluster, train

ROOT = pathlib.Path(__file__).parents[1]
SUPERVISE = str(ROOT / "scripts/supervise.py")
STEPS = 16
# For a machine that many share: what is waited for takes a tenth of it alone.
PATIENCE = 180  # seconds

# scripts/train.py, with steps so slow that there is time to end it in between.
SLOW_TRAIN = """
import os, time
from distill import configure, train
real = train.partitioning.shard_batch
def slowly(*args):
    time.sleep(float(os.environ["SLOW"]))
    return real(*args)
train.partitioning.shard_batch = slowly
if __name__ == "__main__":
    configure.run(train.train)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the caches that all runs of this file share, compiled programs among them."""
    folder = tmp_path_factory.mktemp("multihost")
    (folder / "slow_train.py").write_text(SLOW_TRAIN)
    return folder


def environment(place, devices, slow=0.0):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(place / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SLOW": str(slow),
    }


def train_command(place, name):
    settings = {
        "MIXTURE_OR_TASK_NAME": "arithmetic_step_by_step", "MODEL_DIR": place / name,
        "TRAIN_STEPS": STEPS, "BATCH_SIZE": None, "PAIRS_PER_STEP": 8, "CHECKPOINT_PERIOD": 2,
        "EVALUATOR_NUM_EXAMPLES": 6, "EVAL_STEPS": 1, "CACHE_DIR": place / "cache",
        "NUM_TRAIN_EXAMPLES": 128, "TASK_FEATURE_LENGTHS": "{'inputs': 128, 'targets': 128}",
        "NUM_MICROBATCHES": 1, "TrainConfig.stats_period": 1, "T5Config.num_encoder_layers": 1,
        "T5Config.num_decoder_layers": 1,
    }  # fmt: skip
    return [
        sys.executable, str(place / "slow_train.py"), "--gin_file=t5_1_1/tiny.gin",
        "--gin_file=step_by_step.gin", *(f"--gin.{k}={v}" for k, v in settings.items()),
    ]  # fmt: skip


class Processes:
    """Starts processes whose output goes to files; kills what is left of them at the end."""

    def __init__(self, folder):
        self._folder, self.all, self.logs = folder, [], []

    def start(self, command, env):
        log = self._folder / f"{len(self.all)}.log"
        with log.open("w") as file:
            self.all.append(
                subprocess.Popen(
                    command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        self.logs.append(log)
        return self.all[-1]

    def start_two(self, command, env):
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        for index in range(2):
            flags = [address, "--process_count=2", f"--process_index={index}"]
            self.start([*command, *flags], env)
        return self.all[-2:]

    def wait(self):
        """Exit codes of all."""
        deadline = time.monotonic() + PATIENCE
        for process in self.all:
            try:
                process.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"{process.args} did not end:\n{self.said()}")
        return [process.returncode for process in self.all]

    def until(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if any(p.poll() is not None for p in self.all) or time.monotonic() > deadline:
                pytest.fail(f"{what}: did not come to that:\n{self.said()}")
            time.sleep(0.05)

    def said(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    try:
        yield started
    finally:
        for process in started.all:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def newest(folder):
    """The step of the newest checkpoint; 0 where there is none."""
    if not folder.exists():
        return 0
    return max((int(p.parent.name[11:]) for p in folder.glob("checkpoint_*/manifest.json")),
               default=0)  # fmt: skip


def losses(folder):
    """(step, loss) of every line, repeated steps included."""
    rows = map(json.loads, (folder / "train" / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def report_lines(log):
    """What the run itself printed; Gloo's threads cut each other's lines anywhere."""
    lines = {line.strip() for line in log.splitlines()}
    return {x for x in lines if re.search("[A-Za-z]{3}", x) and not re.search("Gloo|peer|rank", x)}


def children(pid):
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return " Z " not in re.sub(r"\(.*\)", "", pathlib.Path(f"/proc/{pid}/stat").read_text())
    except FileNotFoundError:
        return False


# --- Runs: each test goes on where the one before has left the folder -----------------------------


def test_sigterm_to_one_stops_all_at_one_step(place, processes):
    """Two processes start at once without a token cache, too."""
    folder = place / "two"
    processes.start_two(train_command(place, "two"), environment(place, 2, slow=0.3))
    processes.until(lambda: newest(folder) >= 2, "a checkpoint")
    processes.all[1].send_signal(signal.SIGTERM)
    assert processes.wait() == [train.EXIT_PREEMPTED] * 2, processes.said()
    stopped = newest(folder)
    assert 2 <= stopped < STEPS
    assert losses(folder)[-1][0] == stopped
    leftovers = [p.name for p in folder.glob("checkpoint_*") if not (p / "manifest.json").exists()]
    assert not leftovers
    first, second = (log.read_text() for log in processes.logs)
    assert f"Preempted: step {stopped} is saved" in first and "step 1/" in first
    assert not report_lines(first) & report_lines(second), "only process 0 prints"
    assert len(list((folder / "train").glob("events*"))) == 1
    for split in (place / "cache").iterdir():  # built by both at once, or by one for both
        assert len(list(split.glob("[0-9a-f]*"))) == 1 and not list(split.glob(".*"))


@pytest.mark.slow
def test_supervised_run_comes_back_and_ends_as_one_process_would(place, processes):
    """Resumes; one process is killed; the losses are those of 1 process with all the devices."""
    folder = place / "two"
    before = newest(folder)
    if not before:
        pytest.skip("the test before this one left no checkpoint")
    options = ["--local_processes=2", "--grace=5", "--pause=0.1"]
    supervisor = processes.start(
        [sys.executable, SUPERVISE, *options, *train_command(place, "two")],
        environment(place, 2, slow=0.3),
    )
    processes.until(lambda: newest(folder) > before, "a checkpoint after the resume")
    victim = children(supervisor.pid)[1]
    os.kill(victim, signal.SIGKILL)
    assert processes.wait() == [0], processes.said()
    said = processes.said()
    assert "killed by SIGKILL" in said and "starting again" in said, said
    assert said.count("supervise: started") == 2

    processes.start(train_command(place, "one"), environment(place, 4))
    assert processes.wait() == [0, 0], processes.said()
    expected = dict(losses(place / "one"))
    assert sorted(expected) == list(range(1, STEPS + 1))
    found = losses(folder)
    assert {step for step, _ in found} == set(expected)
    for step, loss in found:
        assert loss == pytest.approx(expected[step], rel=1e-5), step
    assert [c.name for c in checkpoints.list_checkpoints(folder)][-1] == f"checkpoint_{STEPS}"


@pytest.mark.slow  # of what the one before it trained
def test_evaluation_by_two_writes_what_one_does(place, processes):
    if newest(place / "one") != STEPS:
        pytest.skip("the test before this one left no checkpoint")

    def command(name):
        settings = {
            "CHECKPOINT_PATH": place / "one", "EVALUATOR_NUM_EXAMPLES": 5, "BATCH_SIZE": 3,
            "CACHE_DIR": place / "cache", "EVAL_OUTPUT_DIR": place / name,
        }  # fmt: skip
        script = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--gin_file=eval.gin"]
        return script + [f"--gin.{k}={v}" for k, v in settings.items()]

    processes.start_two(command("by_two"), environment(place, 2))
    assert processes.wait() == [0, 0], processes.said()
    processes.start(command("by_one"), environment(place, 4))
    assert processes.wait() == [0, 0, 0], processes.said()
    one, two = place / "by_one", place / "by_two"
    names = sorted(str(p.relative_to(one)) for p in one.glob("**/*.jsonl"))
    assert names == sorted(str(p.relative_to(two)) for p in two.glob("**/*.jsonl"))
    assert len(names) == 4  # results, predictions, and two of their metrics
    for name in names:
        if name != "results.jsonl":  # has the time in it
            assert (two / name).read_text() == (one / name).read_text()
    assert _untimed(two / "results.jsonl") == _untimed(one / "results.jsonl")
    tables = [log.read_text().count("1 computed") for log in processes.logs]
    assert tables == [1, 0, 1], "only process 0 prints"


# scripts/evaluate.py; the first checkpoint is deleted when one process has looked, the other not.
DELETED = """
import os
from distill import configure, convert, evaluate, students
real = convert.open_weights
def late(path):
    if path.endswith("checkpoint_1") and os.environ["ROLE"] == "late":
        raise FileNotFoundError(path)
    return real(path)
convert.open_weights = late
if os.environ["ROLE"]:
    students.is_there = lambda checkpoint: checkpoint.step != 1
def run(argv):
    print("scores:", len(configure.execute(evaluate.evaluate, argv)))
if __name__ == "__main__":
    configure.run_main(run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deleted", "damaged"])
def test_a_checkpoint_that_one_process_cannot_read_is_read_by_none(
    place, processes, tmp_path, kind
):
    """Nobody waits in a collective for who has gone on to the next checkpoint."""
    for step in (1, 2):
        save(tmp_path / "run", step, step, last_step=2)
    if kind == "damaged":  # which the first process finds, for both
        largest = max((tmp_path / "run/checkpoint_1").glob("**/*"), key=lambda f: f.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    (place / "deleted.py").write_text(DELETED)
    settings = {
        "CHECKPOINT_PATH": tmp_path / "run", "RESTORE_MODE": "all", "EVALUATOR_NUM_EXAMPLES": 3,
        "CACHE_DIR": place / "cache", "MIXTURE_OR_TASK_NAME": "arithmetic_predict",
    }  # fmt: skip
    command = [sys.executable, str(place / "deleted.py"), "--gin_file=eval.gin"]
    command += [f"--gin.{k}={v}" for k, v in settings.items()]
    command.append(f"--coordinator_address=127.0.0.1:{free_port()}")
    for index in range(2):
        role = ("early", "late")[index] if kind == "deleted" else ""
        env = environment(place, 2) | {"ROLE": role}
        processes.start([*command, "--process_count=2", f"--process_index={index}"], env)
    codes = processes.wait()
    if kind == "damaged":
        assert codes == [2, 2] and processes.said().count("checkpoint_1 is damaged") >= 2
    else:
        assert codes == [0, 0], processes.said()
        assert processes.said().count("scores: 1") == 2 and "has gone meanwhile" in processes.said()


def _untimed(path):
    return [{**json.loads(line), "time": None} for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_tensor_over_two_processes(place, processes):
    """Both hold parts of the same rows, so both must read the same rows."""
    mesh = ["--gin.MeshConfig.data=1", "--gin.MeshConfig.tensor=4"]
    processes.start_two([*train_command(place, "tensor"), *mesh], environment(place, 2))
    assert processes.wait() == [0, 0], processes.said()
    processes.start([*train_command(place, "tensor_one"), *mesh], environment(place, 4))
    assert processes.wait() == [0, 0, 0], processes.said()
    expected = dict(losses(place / "tensor_one"))
    for step, loss in losses(place / "tensor"):
        assert loss == pytest.approx(expected[step], rel=1e-5), step


# --- Joining --------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The arguments of every call of jax.distributed.initialize, which does nothing."""
    import jax

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    return calls


def test_nothing_is_started_where_nothing_says_so(started, monkeypatch):
    cluster.start()
    cluster.start("none")
    with pytest.raises(ValueError, match="nothing here says"):
        cluster.start("auto")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # one task: "auto" in a job script is no mistake
    cluster.start("auto")
    assert not started


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("h:1",), "--coordinator_address without --process_count and --process_index"),
        (("h:1", 2), "--coordinator_address and --process_count without --process_index"),
        ((None, 2, 0), "--process_count and --process_index without --coordinator_address"),
        (("auto", 2, 0), "host:port, not 'auto'"),
        (("h", 2, 0), "is not host:port"),
        (("h:1", 2, 2), r"--process_index=2 is not in 0\.\.1"),
        (("h:1", 2, -1), "--process_index=-1"),
        (("h:1", 0, 0), "--process_count=0"),
    ],
)
def test_flags_that_do_not_fit(started, arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster.start(*arguments)
    assert not started


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip


@pytest.mark.parametrize(
    "variables,is_tpu_host,name",
    [
        ({}, False, None),
        (SLURM, False, "slurm"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False, None),  # srun --pty in an allocation of 2
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False, None),  # sbatch
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, False, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "mpi4py"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({}, True, "tpu"),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "k"}, True, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True, "tpu"),
        ({"KUBERNETES_SERVICE_HOST": "k"}, False, None),  # a pod to work in
        ({"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "0"}, False, "k8s"),
    ],
)
def test_environments(variables, is_tpu_host, name):
    assert cluster.environment(variables, is_tpu_host) == name


def test_one_slurm_task_on_a_node_has_all_its_gpus(started, monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    cluster.start()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    cluster.start()
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    cluster.start("auto")
    assert [s.get("local_device_ids") for s in started] == [None, None, [0, 1, 2, 3]]


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_finds_nobody_says_so(place, index):
    code = f"from distill import cluster; cluster.start('127.0.0.1:{free_port()}', 2, {index}, "
    done = subprocess.run(
        [sys.executable, "-c", code + "initialization_timeout=2)"], env=environment(place, 1),
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == cluster.EXIT_UNREACHABLE, done.stderr
    assert f"Process {index} of 2 waited 2 s at 127.0.0.1" in done.stderr


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    with pytest.raises(ValueError, match="all hosts share"):
        train._require_shared(tmp_path)


STOPPED = """
import signal, sys, time
from distill import cluster
cluster.start("127.0.0.1:{port}", 1, 0)
print("joined", flush=True)
if {asks}:
    with cluster.preemption() as stops:
        print("asks", flush=True)
        step = 0
        while not stops(step):
            step += {asks} - 1
            time.sleep(0.05)
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                print("noticed", flush=True)
    sys.exit(75)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "asks,signals,code",
    [
        (0, 1, -signal.SIGTERM),  # does not train: jax alone would only take a note of it
        (2, 1, 75),
        (1, 2, -signal.SIGTERM),  # never comes to another step
    ],
)
def test_what_sigterm_does_under_jax_distributed(place, processes, asks, signals, code):
    script = STOPPED.format(port=free_port(), asks=asks)
    child = processes.start([sys.executable, "-c", script], environment(place, 1))
    processes.until(lambda: ("asks" if asks else "joined") in processes.said(), "the start")
    child.send_signal(signal.SIGTERM)
    if signals > 1:
        processes.until(lambda: "noticed" in processes.said(), "the first one's effect")
        child.send_signal(signal.SIGTERM)
    assert processes.wait() == [code], processes.said()


# --- The supervisor -------------------------------------------------------------------------------


def supervise(processes, place, code, *options):
    command = [sys.executable, SUPERVISE, "--pause=0.05", *options, sys.executable, "-c", code]
    return processes.start(command, environment(place, 1))


def pids_of(log):
    return [int(p) for line in re.findall(r"\(process(?:es)? ([\d, ]+)\)", log.read_text())
            for p in line.split(", ")]  # fmt: skip


SLEEPS = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
{then}
print("grandchild", child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "code,expected,starts",
    [
        ("import sys; sys.exit(0)", 0, 1),
        ("import sys; sys.exit(2)", 2, 1),
        ("import sys; sys.exit(75)", 70, 3),
        ("import os; os.abort()", 70, 3),
    ],
)
def test_what_is_started_again(place, processes, code, expected, starts):
    supervise(processes, place, code, "--max_restarts=2")
    assert processes.wait() == [expected], processes.said()
    assert processes.said().count("supervise: started") == starts


def test_a_users_error_of_one_process_ends_all(place, processes):
    code = "import sys, time; time.sleep(600 if sys.argv[-1].endswith('=0') else 0); sys.exit(2)"
    supervise(processes, place, code, "--local_processes=2", "--grace=0.5")
    assert processes.wait() == [2], processes.said()
    assert not any(map(is_running, pids_of(processes.logs[0])))


def test_progress_is_a_new_checkpoint(place, processes, tmp_path):
    """Five starts, though only one in a row may fail: each saves a checkpoint."""
    code = (
        "import pathlib, sys; run = pathlib.Path(sys.argv[1].partition('=')[2]); "
        "n = len(list(run.glob('checkpoint_*'))); "
        "new = run / f'checkpoint_{n}'; "
        "n < 4 and (new.mkdir(parents=True), (new / 'manifest.json').touch()); "
        "sys.exit(75 if n < 4 else 0)"
    )
    command = [sys.executable, SUPERVISE, "--max_restarts=0", sys.executable, "-c", code]
    processes.start([*command, f"--gin.MODEL_DIR={tmp_path / 'run'}"], environment(place, 1))
    assert processes.wait() == [0], processes.said()
    assert processes.said().count("supervise: started") == 5


SAVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.parametrize(
    "then,signums,code",
    [
        (SAVES, [signal.SIGTERM], 75),
        ("", [signal.SIGTERM], 143),
        ("", [signal.SIGINT], 130),
        (DEAF, [signal.SIGTERM, signal.SIGTERM], 143),
        ("", [signal.SIGKILL], -9),
    ],
)
def test_nothing_is_left_when_the_supervisor_is_stopped(place, processes, then, signums, code):
    supervisor = supervise(processes, place, SLEEPS.format(then=then), "--local_processes=2")
    grandchildren = re.compile(r"grandchild (\d+)")
    processes.until(lambda: len(grandchildren.findall(processes.said())) == 2, "two processes")
    pids = pids_of(processes.logs[0])
    inner = [int(p) for p in grandchildren.findall(processes.said())]
    assert len(pids) == 2 and all(map(is_running, pids + inner))
    for number, signum in enumerate(signums):
        if number:
            processes.until(lambda: "passed on" in processes.said(), "the first signal")
        supervisor.send_signal(signum)
    assert processes.wait() == [code], processes.said()
    gone = pids if signum == signal.SIGKILL else pids + inner
    deadline = time.monotonic() + PATIENCE
    while any(map(is_running, gone)):
        assert time.monotonic() < deadline, "a process outlived its supervisor"
        time.sleep(0.05)
    for pid in inner:  # Linux tells a process of its parent's death, not of its grandparent's
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
