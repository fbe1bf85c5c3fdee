"""The launchers of scripts/tpu and scripts/gpu, without a cloud, a cluster or a GPU.

Dry runs see a PATH with a handful of commands and neither gcloud nor sbatch. The loop of
`tpu.sh resume-until-done` runs against a stand-in for gcloud that tells a story of preemptions.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from distill import configure, estimate, plan, train

ROOT = pathlib.Path(__file__).resolve().parents[1]
TPU, GPU = ROOT / "scripts/tpu", ROOT / "scripts/gpu"
SCRIPTS = sorted([*TPU.glob("*.sh"), *GPU.glob("*.sh"), *GPU.glob("*.sbatch")])
GUIDE = (ROOT / "docs/launch.md").read_text("utf-8")
# What the scripts may use of the machine they are started on.
COMMANDS = ("bash", "git", "dirname", "awk", "sed", "grep", "sort", "tail", "date", "sleep", "cat")
SETTINGS = {
    "PROJECT": "my-project", "ZONE": "us-west4-a", "TPU_NAME": "my-run",
    "ACCELERATOR_TYPE": "v5litepod-8",
}  # fmt: skip
JOBSET = {
    "JOB_NAME": "my-run", "IMAGE": "registry/distill:1", "TPU_ACCELERATOR": "tpu-v5-lite-podslice",
    "TPU_TOPOLOGY": "4x4",
}  # fmt: skip
ARGUMENTS = ["--gin_file=t5_1_1/base.gin", "--gin.MODEL_DIR=gs://b/a run"]
VERBS = ["create", "setup", "submit", "status", "logs", "stop", "resume-until-done", "delete"]

needs_git = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout"
)


@pytest.fixture
def run(tmp_path):
    """Runs a script with few commands on PATH; `more` are programs: name -> text."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in COMMANDS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)

    def call(script, *arguments, env=(), more=()):
        for name, text in dict(more).items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return subprocess.run(
            [str(folder / "bash"), str(script), *arguments],
            # git refuses the checkout of another user, unless told.
            env={"PATH": str(folder), "HOME": str(tmp_path), "GIT_CONFIG_COUNT": "1",
                 "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*", **dict(env)},
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return call


def commands(output: str) -> list[list[str]]:
    """The commands of a dry run, as words, read as the shell would that they are pasted into."""
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


# --- The scripts as text --------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck():
    program = shutil.which("shellcheck") or os.environ.get("SHELLCHECK")
    if not program:
        pytest.skip("no shellcheck on PATH, and SHELLCHECK does not name one")
    checked = [*SCRIPTS, ROOT / "scripts/test.sh"]
    result = subprocess.run(
        [program, "-x", *map(str, checked)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


# --- tpu.sh ---------------------------------------------------------------------------------------


@needs_git
@pytest.mark.parametrize("verb", VERBS)
def test_tpu_dry_run(run, verb):
    arguments = ARGUMENTS if verb in ("submit", "resume-until-done") else []
    result = run(TPU / "tpu.sh", verb, *arguments, env={**SETTINGS, "DRY_RUN": "1"})
    assert result.returncode == 0, result.stderr
    printed = commands(result.stdout)
    assert printed
    for command in printed:
        assert command[0] in ("gcloud", "git")
        assert not re.search(r"\$|\bNone\b|=$", " ".join(command)), "a placeholder is empty"
        if command[0] == "gcloud":
            assert command[-2:] == ["--project=my-project", "--zone=us-west4-a"]
            assert any(word.split(":")[0] == "my-run" for word in command)


@needs_git
def test_tpu_dry_run_of_a_whole_run(run):
    result = run(TPU / "tpu.sh", "resume-until-done", *ARGUMENTS, env={**SETTINGS, "DRY_RUN": "1"})
    lines = [" ".join(command) for command in commands(result.stdout)]
    expected = [
        "queued-resources create my-run --node-id=my-run --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot",
        "queued-resources describe", "git -C", "tpu-vm scp", "worker.sh setup",
        "worker.sh start scripts/train.py --coordinator_address=auto", "worker.sh state",
        "queued-resources delete my-run --force",
    ]  # fmt: skip
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line
    # The worker's shell gets the arguments as they were given, blanks included.
    (start,) = [w for w in commands(result.stdout)[5] if w.startswith("--command=")]
    assert shlex.split(start.removeprefix("--command="))[-2:] == ARGUMENTS


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-128", "tpu-ubuntu2204-base"), ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)  # fmt: skip
def test_tpu_runtime_versions(run, kind, version):
    env = {**SETTINGS, "DRY_RUN": "1", "ACCELERATOR_TYPE": kind}
    assert f"--runtime-version={version}" in run(TPU / "tpu.sh", "create", env=env).stdout
    own = run(TPU / "tpu.sh", "create", env={**env, "RUNTIME_VERSION": "mine"})
    assert "--runtime-version=mine" in own.stdout


@pytest.mark.parametrize(
    ("provisioning", "flags"),
    [("spot", {"--spot"}), ("reserved", {"--reserved"}), ("on-demand", set())],
)
def test_tpu_provisioning(run, provisioning, flags):
    env = {**SETTINGS, "DRY_RUN": "1", "PROVISIONING": provisioning, "CREATE_FLAGS": "--a=1 --b"}
    create = commands(run(TPU / "tpu.sh", "create", env=env).stdout)[0]
    assert {"--spot", "--reserved", "--on-demand"} & set(create) == flags
    assert {"--a=1", "--b"} <= set(create)


@pytest.mark.parametrize("missing", ["PROJECT", "ZONE", "TPU_NAME", "ACCELERATOR_TYPE"])
def test_tpu_missing_setting(run, missing):
    env = {name: value for name, value in SETTINGS.items() if name != missing}
    result = run(TPU / "tpu.sh", "create", env={**env, "DRY_RUN": "1"})
    assert result.returncode == 2 and f"not set: {missing}." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "unknown verb ''"),
        (["sumbit"], {}, "unknown verb 'sumbit'"),
        (["submit"], {}, "submit needs the arguments of scripts/train.py"),
        (["delete", "--force"], {}, "delete takes no arguments"),
        (["create"], {"ACCELERATOR_TYPE": "v5e-8"}, "v5litepod-N for v5e"),
        (["create"], {"PROVISIONING": "cheap"}, "PROVISIONING must be spot"),
    ],
)
def test_tpu_wrong_use(run, arguments, env, message):
    result = run(TPU / "tpu.sh", *arguments, env={**SETTINGS, "DRY_RUN": "1", **env})
    assert result.returncode == 2 and message in result.stderr


# Answers from a list of words: the next of `slice` to `queued-resources describe`, the next of
# `run` to `worker.sh state`; the last one of a list stays.
GCLOUD = """#!/usr/bin/env bash
next() {  # next FILE: prints its first line, and removes it unless it is the last
  { read -r first; rest="$(cat)"; } < "$HOME/$1"
  if [[ -n "$rest" ]]; then echo "$rest" > "$HOME/$1"; fi
  echo "$first"
}
echo "$*" >> "$HOME/calls"
case "$*" in
  *queued-resources\\ describe*)
    state="$(next slice)"
    if [[ "$state" == NONE ]]; then echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; fi
    if [[ "$state" == BROKEN ]]; then echo "ERROR: log in first" >&2; exit 1; fi
    echo "$state" ;;
  *tpu-vm\\ describe*) echo READY ;;
  *worker.sh\\ state*)
    state="$(next run)"
    if [[ "$state" == unreachable ]]; then exit 255; fi
    for worker in ${state//,/ }; do echo "w distill-state: ${worker//_/ }"; done ;;
esac
"""


def story(run, tmp_path, slice_states: str, run_states: str, **env):
    """Runs resume-until-done through a story -> (its result, the verbs of the calls in order)."""
    (tmp_path / "slice").write_text(slice_states.replace(" ", "\n") + "\n")
    (tmp_path / "run").write_text(run_states.replace(" ", "\n") + "\n")
    quick = {"POLL_SECONDS": "0", "FIRST_DELAY": "0"}
    result = run(
        TPU / "tpu.sh", "resume-until-done", *ARGUMENTS,
        env={**SETTINGS, **quick, "TMPDIR": str(tmp_path), **env}, more={"gcloud": GCLOUD},
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text()
    steps = re.findall(r"queued-resources (create|delete)|worker\.sh (setup|start)", calls)
    return result, [a or b for a, b in steps]


BEGIN = ["create", "setup", "start"]


@needs_git
@pytest.mark.parametrize(
    ("slice_states", "run_states", "code", "steps"),
    [
        # Nothing happens.
        ("NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "none running,running exit_0,exit_0",
         0, BEGIN),
        # A worker ends before the others.
        ("NONE ACTIVE", "none exit_0,running exit_0,exit_0", 0, BEGIN),
        # Stopped and saved; one worker was killed because the other had left.
        ("NONE ACTIVE", "none running exit_134,exit_75 exit_75 exit_0", 0,
         [*BEGIN, "setup", "start"]),
        # The slice is taken away under the run, and once more before it is ready.
        ("NONE ACTIVE SUSPENDING SUSPENDED SUSPENDED WAITING_FOR_RESOURCES FAILED FAILED ACTIVE",
         "none running unreachable unreachable none exit_0", 0,
         [*BEGIN, "delete", "create", "delete", *BEGIN]),
        # Preempted as often as failures are allowed: they do not count.
        ("NONE ACTIVE" + 3 * " SUSPENDED SUSPENDED ACTIVE", "none" + 3 * " unreachable none"
         + " exit_0", 0, BEGIN + 3 * ["delete", *BEGIN]),
        # An error of the user, though another worker died otherwise.
        ("NONE ACTIVE", "none running exit_2,exit_134", 2, BEGIN),
        # It crashes again and again.
        ("NONE ACTIVE", "none running exit_1", 1, [*BEGIN, "setup", "start", "setup", "start"]),
        # Started again on the user's machine while the run goes on.
        ("ACTIVE", "running running exit_0", 0, []),
    ],
    ids=["plain", "uneven", "saved", "preempted", "often", "user_error", "crashes", "attach"],
)  # fmt: skip
def test_resume_until_done(run, tmp_path, slice_states, run_states, code, steps):
    result, done = story(run, tmp_path, slice_states, run_states, MAX_FAILURES="3")
    assert (result.returncode, done) == (code, steps), result.stderr


def test_resume_until_done_keeps_the_commit(run, tmp_path):
    """Also where the user goes on committing meanwhile."""
    git = """#!/usr/bin/env bash
    if [[ "$*" == *rev-parse* ]]; then echo x >> "$HOME/n"; grep -c x "$HOME/n"; fi
    """
    run(TPU / "tpu.sh", "help", more={"git": git})
    story(run, tmp_path, "NONE ACTIVE", "none running exit_75 exit_75 exit_0")
    sent = re.findall(r"scp \S+/(\S+) ", (tmp_path / "calls").read_text())
    assert sent == ["distill-1.tar.gz"] * 2


@needs_git
def test_resume_until_done_gives_up_where_gcloud_fails(run, tmp_path):
    result, done = story(run, tmp_path, "BROKEN", "none", MAX_FAILURES="2")
    assert result.returncode == 1 and "log in first" in result.stderr and not done


# --- worker.sh ------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
    """`worker.sh VERB ...` in a home folder whose python is a shell script: worker(text)(verb)."""
    if not shutil.which("setsid"):
        pytest.skip("no setsid")
    (tmp_path / "distill/scripts/tpu").mkdir(parents=True)
    shutil.copy(TPU / "worker.sh", tmp_path / "distill/scripts/tpu")
    python = tmp_path / "distill-venv/bin/python"
    python.parent.mkdir(parents=True)

    def call(verb, *arguments, program=None):
        if program:
            python.write_text(f"#!/usr/bin/env bash\n{program}\n")
            python.chmod(0o755)
        result = subprocess.run(
            ["bash", "distill/scripts/tpu/worker.sh", verb, *arguments],
            env={**os.environ, "HOME": str(tmp_path)},
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return result if verb == "start" else result.stdout.partition("distill-state: ")[2].strip()

    return call


def wait_for_end(worker) -> str:
    deadline = time.monotonic() + 30
    while (state := worker("state")) == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    return state


def test_worker_keeps_the_exit_code_and_the_log(worker, tmp_path):
    assert worker("state") == "none"
    started = worker("start", "train.py", "--a=b c", program='echo "got $1|$2"; exit 2')
    assert started.returncode == 0
    assert wait_for_end(worker) == "exit 2"
    assert "got train.py|--a=b c" in (tmp_path / "distill-run/log").read_text()
    worker("start", "x", program="exit 0")
    assert wait_for_end(worker) == "exit 0"


@pytest.mark.parametrize("by", ["stop", "shutdown"])
def test_worker_lets_the_run_save(worker, tmp_path, by):
    ready = tmp_path / "ready"
    program = f"trap 'sleep 0.5; exit 75' TERM; touch {ready}; while true; do sleep 0.1; done"
    worker("start", "x", program=program)
    assert worker("state") == "running"
    assert worker("start", "y").returncode == 1, "two runs at once"
    while not ready.exists():
        time.sleep(0.05)
    if by == "stop":
        worker("stop")
    else:  # signals every process, the shell that is to write the exit code included
        os.killpg(os.getpgid(int((tmp_path / "distill-run/pid").read_text())), signal.SIGTERM)
    assert wait_for_end(worker) == "exit 75"


# --- GKE ------------------------------------------------------------------------------------------


def test_jobset(run):
    arguments = [*ARGUMENTS, '--gin.TASK_FEATURE_LENGTHS={"a&b": 1}', r"--x=\d # ${y}"]
    result = run(TPU / "jobset.sh", *arguments, env=JOBSET)
    assert result.returncode == 0, result.stderr
    text = "\n".join(line for line in result.stdout.splitlines() if not line.startswith("#"))
    assert not re.findall(r"\$\{[A-Z_]+\}", text)
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["name"] == "my-run"
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (1, 4, 4)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["args"] == ["--coordinator_address=auto", *arguments]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # A user's error fails the JobSet by way of the Job; everything else restarts.
    (pod_rule,) = spec["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob" and pod_rule["onExitCodes"]["values"] == [2]
    assert pod_rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    failure = job["spec"]["failurePolicy"]
    assert failure["maxRestarts"] == 50
    (rule,) = failure["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_jobset_template_is_yaml():
    assert yaml.safe_load((TPU / "jobset.yaml").read_text("utf-8"))["kind"] == "JobSet"


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"), [("2x4", "8", 1), ("2x2x1", "4", 1), ("4x4x2", "4", 8)]
)
def test_jobset_hosts(run, topology, chips, hosts):
    env = {**JOBSET, "TPU_TOPOLOGY": topology, "CHIPS_PER_HOST": chips}
    job = yaml.safe_load(run(TPU / "jobset.sh", "--gin_file=x", env=env).stdout)
    assert job["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == hosts


@pytest.mark.parametrize("missing", JOBSET)
def test_jobset_missing_setting(run, missing):
    env = {name: value for name, value in JOBSET.items() if name != missing}
    result = run(TPU / "jobset.sh", "--gin_file=x", env=env)
    assert result.returncode == 2 and f"not set: {missing}." in result.stderr and not result.stdout


@pytest.mark.parametrize(("topology", "message"), [("16", "4x4"), ("3x3", "does not divide")])
def test_jobset_wrong_topology(run, topology, message):
    result = run(TPU / "jobset.sh", "--gin_file=x", env={**JOBSET, "TPU_TOPOLOGY": topology})
    assert result.returncode == 2 and message in result.stderr


# --- GPU ------------------------------------------------------------------------------------------


def test_single_node_dry_run(run):
    result = run(GPU / "single_node.sh", *ARGUMENTS, env={"DRY_RUN": "1", "XLA_FLAGS": "--mine=1"})
    assert result.returncode == 0, result.stderr
    *exports, command = commands(result.stdout)
    assert command == ["exec", ".venv/bin/python", "scripts/train.py", *ARGUMENTS]
    flags = next(word for export in exports for word in export if word.startswith("XLA_FLAGS="))
    assert flags.endswith(" --mine=1"), "what the user sets comes last, and so wins"


def test_single_node_passes_the_exit_code_on(run, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$NCCL_DEBUG $XLA_FLAGS $*"; exit 75\n')
    python.chmod(0o755)
    result = run(GPU / "single_node.sh", *ARGUMENTS, env={"PYTHON": str(python)})
    assert result.returncode == 75
    assert result.stdout.startswith("WARN --xla_gpu") and "gs://b/a run" in result.stdout


def test_single_node_says_what_is_missing(run):
    absent = run(GPU / "single_node.sh", "--gin_file=x", env={"PYTHON": "/no/python"})
    assert absent.returncode == 2 and "PYTHON=/no/python is not there" in absent.stderr
    for script in (GPU / "single_node.sh", GPU / "slurm.sbatch"):
        empty = run(script, env={"DRY_RUN": "1"})
        assert empty.returncode == 2 and "arguments of scripts/train.py" in empty.stderr


def test_slurm_dry_run(run):
    result = run(GPU / "slurm.sbatch", *ARGUMENTS, env={"DRY_RUN": "1"})
    assert result.returncode == 0, result.stderr
    *_, srun, requeue = commands(result.stdout)
    assert srun[0] == "srun"
    tail = [".venv/bin/python", "scripts/train.py", "--coordinator_address=auto", *ARGUMENTS]
    assert srun[-len(tail) :] == tail
    assert requeue == ["scontrol", "requeue", "JOB_ID"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_slurm_requeues_what_was_preempted(run, tmp_path, code, requeued):
    spooled = tmp_path / "slurm_script"  # SLURM runs a copy
    shutil.copy(GPU / "slurm.sbatch", spooled)
    tools = {
        "srun": f'#!/usr/bin/env bash\necho "cpus $SRUN_CPUS_PER_TASK"; exit {code}\n',
        "scontrol": '#!/usr/bin/env bash\necho "$*" > "$HOME/scontrol"\n',
    }
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    result = run(spooled, *ARGUMENTS, env=slurm, more=tools)
    assert result.returncode == code and "cpus 8" in result.stdout
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_slurm_directives():
    text = (GPU / "slurm.sbatch").read_text("utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options["signal"] == "TERM@120" and "requeue" in options
    # JAX gives each task of a node one GPU, by number.
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options
    body = text.partition("set -euo pipefail")[2]
    assert "#SBATCH" not in body, "sbatch stops reading at the first command"


def test_exit_code_of_preemption():
    assert train.EXIT_PREEMPTED == 75
    for path in (TPU / "tpu.sh", GPU / "slurm.sbatch"):
        assert "75" in path.read_text("utf-8")


def test_xla_knows_the_flags():
    """XLA ends the process on a flag that it does not know, also on a CPU."""
    for text in ((GPU / "_env.sh").read_text("utf-8"), GUIDE):
        flags = " ".join(re.findall(r"--xla_\w+=\w+", text))
        assert flags
        subprocess.run(
            [sys.executable, "-c", "import jax; jax.numpy.zeros(1)"],
            env={**os.environ, "XLA_FLAGS": flags}, check=True, capture_output=True,
        )  # fmt: skip


def test_memory_fraction_by_its_old_name(run):
    """JAX refuses to start where both names are set."""
    old = {"DRY_RUN": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    assert "MEM_FRACTION" not in run(GPU / "single_node.sh", "--x", env=old).stdout
    new = {"DRY_RUN": "1", "XLA_CLIENT_MEM_FRACTION": "0.5"}
    assert "XLA_CLIENT_MEM_FRACTION='0.5'" in run(GPU / "single_node.sh", "--x", env=new).stdout


def test_dockerfile():
    lines = (GPU / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    base = next(line for line in lines if line.startswith("ARG BASE="))
    assert re.search(r"python:3\.\d+\.\d+-slim-\w+$", base), "pinned"
    sources = {name for line in words if line[0] == "COPY" for name in line[1:-1]}
    assert {"distill", "gin_configs", "tasks", "scripts", "constraints.txt"} <= sources
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name in sources:
        assert (ROOT / name).exists(), name
        assert f"!{name.split('/')[0]}" in ignored, f".dockerignore leaves {name} out"
    names = [line[0] for line in words]
    assert ["USER", "distill"] in words and names.index("USER") > names.index("RUN")
    extras = re.search(r"^ARG EXTRAS=(.+)$", "\n".join(lines), re.MULTILINE).group(1)
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert all(f'"{extra}":' in setup for extra in [*extras.split(","), "tpu"])


# --- The guide ------------------------------------------------------------------------------------


def common_arguments() -> list[str]:
    command = re.search(r"^python scripts/train\.py (.+?[^\\])\n```", GUIDE, re.M | re.S).group(1)
    return shlex.split(command.replace("\\\n", " "))


ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d+) \| `(--gin_file=[^`]+)` \|", GUIDE, re.M)


def test_guide_has_all_sizes():
    models = {re.search(r"t5_1_1/(\w+)\.gin", row[3]).group(1) for row in ROWS}
    assert models == {"base", "large", "xl", "xxl"} and len(ROWS) >= 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}".replace(" ", "_"))
def test_row_of_the_guide(row):
    """The command resolves, rows and parameters divide by the mesh, and by the formula it fits."""
    _, hardware, devices, arguments = row
    argv = ["train.py", *common_arguments(), *shlex.split(arguments)]
    given = configure.resolved_arguments(train.train, argv)
    # v2 to v5p are named by TensorCores, of which JAX sees two as one device; v5e and v6e by chips.
    if name := re.search(r"`v(4|5p|5litepod|6e)-(\d+)`", hardware):
        chips = int(name.group(2)) // (2 if name.group(1) in ("4", "5p") else 1)
        assert chips == int(devices)
        chip = "v" + name.group(1).replace("5litepod", "5e")
    else:
        chip = "h200-141gb" if "141 GB" in hardware else "a100-80gb"
    where = plan.Topology(chip, estimate.CHIPS[chip], None, int(devices))
    model = dataclasses.replace(given["model"], dtype="bfloat16")
    rows, parts = given["data"].batch_size, given["config"].num_microbatches or 1
    mesh = estimate.choose_mesh(
        given["mesh"], model, given["optimizer"], rows // parts, where.chip, where.size
    )
    work = estimate.Work(rows, 1024, 256, parts)
    setup = plan.Setup(model, given["optimizer"], given["objective"], mesh, work)
    assert plan.estimated(setup, where).fits


def test_one_row_by_the_command_line(capsys):
    argv = ["train.py", *common_arguments(), *shlex.split(ROWS[-1][3]), "--dry_run"]
    assert configure.execute(train.train, argv) is None
    assert "remat_policy = 'full'" in capsys.readouterr().out


def test_guide_names_what_exists():
    for path in re.findall(r"\b(?:scripts|docs)/[\w/]+\.(?:sh|py|sbatch|yaml|md)\b", GUIDE):
        assert (ROOT / path).is_file(), path
    for verb in re.findall(r"scripts/tpu/tpu\.sh ([\w-]+)", GUIDE):
        assert verb in VERBS
    for verb in VERBS:
        assert f"tpu.sh {verb}" in GUIDE
    help_text = subprocess.run(
        ["bash", TPU / "tpu.sh", "help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(verb in help_text for verb in VERBS) and "set -euo" not in help_text


def test_guide_knows_the_settings():
    text = "\n".join(script.read_text("utf-8") for script in SCRIPTS)
    settings = {*re.findall(r'([A-Z_]+)="\$\{\1:-', text), "DRY_RUN", "ARGUMENTS"}
    used = set(re.findall(r"(?:export |^|`|\s)([A-Z][A-Z_]+)=", GUIDE, re.M)) - {
        "XLA_FLAGS",
        "EXTRAS",
    }
    assert {"PROJECT", "JOB_NAME", "TPU_TOPOLOGY", "XLA_CLIENT_MEM_FRACTION"} <= used
    assert used <= settings
