r"""Decoding beside transformers' `generate`: equal tokens, and examples a second.

    python scripts/benchmarks/decode.py --data_dir=/data --vocabulary=/data/spiece.model \
        --checkpoint=/tmp/cqa_small

  forced   64 inputs, 64 tokens each: random weights whose answers never end. transformers pads the
           64 rows to the longest and decodes them as one batch, as we do
  labels   the whole split with a trained student (--checkpoint), greedy. transformers decodes
           batches of 64 in the order of the file, each padded to its longest, until all its rows
           have ended; we sort by length
  beams    the same, a part of the split, 4 beams without length penalty. Not timed in rounds
  equal    the tokens of 200 inputs of the split, greedy and 4 beams: how many answers differ, and
           how close what decided was; it fails where that is not within 1e-4

Weights go to transformers by way of our export. It runs in a process of its own on the same
threads and device, both with malloc told to keep freed memory, float32 in both, contestants taking
turns; a time is from token ids to token ids. CPU seconds are those of all cores together: on a
machine that others use they vary less.
"""

import dataclasses
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

# Before jax: torch shall find memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import record
from absl import app, flags

from distill import (
    cache,
    checkpoints,
    configure,
    convert,
    decode,
    export,
    partitioning,
    students,
    t5,
    train,
)  # fmt: skip

_WHAT = flags.DEFINE_list("what", ["forced", "labels", "beams", "equal"], "Parts to run.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "'bytes' or a SentencePiece model.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Of tokenised rows [DISTILL_CACHE_DIR].")
_TASK = flags.DEFINE_string("task", "cqa_label/test", "NAME/SPLIT of the inputs.")
_MODEL = flags.DEFINE_string("model", "t5_1_1/small", "Released size of the forced part.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A MODEL_DIR, or one checkpoint in it.")
_ROWS = flags.DEFINE_integer("rows", 64, "Inputs of a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("max_length", 64, "Tokens of an answer at most.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each contestant.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 200, "Inputs of `equal` and `beams`.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for every measurement.")

# Answers may differ where what decided was this close: other sums of the same numbers.
TIE = 1e-4

TORCH = """
import ctypes, json, resource, sys, time
if sys.argv[2] == "keep":
    libc = ctypes.CDLL(None)
    for name, value in ((-1, -1), (-2, 256 << 20), (-4, 0)):  # as train.keep_freed_memory
        libc.mallopt(name, value)
import torch, transformers
transformers.logging.set_verbosity_error()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = transformers.T5ForConditionalGeneration.from_pretrained(sys.argv[1]).eval().to(device)

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), used.ru_utime + used.ru_stime

def answers(inputs, settings):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in inputs], batch_first=True)
    ids = ids.to(device)
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), do_sample=False,
                               return_dict_in_generate=True, **settings)
    margins = []
    if settings.get("output_logits"):
        best = torch.stack(found.logits, dim=1).topk(2, dim=-1).values
        margins = (best[..., 0] - best[..., 1]).tolist()
    return found.sequences[:, 1:].tolist(), margins

print("ready", torch.get_num_threads(), device, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    inputs, rows = request["inputs"], request["rows"]
    (wall, cpu), tokens, margins = seconds(), [], []
    for start in range(0, len(inputs), rows):
        found = answers(inputs[start:start + rows], request["settings"])
        tokens += found[0]
        margins += found[1]
    end = seconds()
    print(json.dumps({"wall": end[0] - wall, "cpu": end[1] - cpu, "tokens": tokens,
                      "margins": margins}), flush=True)
"""


@dataclasses.dataclass
class Answers:
    """Of one contestant in one turn: tokens without EOS, wall and CPU seconds."""

    tokens: list[list[int]]
    wall: float
    cpu: float
    margins: list[list[float]] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)


class Ours:
    """A student of ours on one device."""

    def __init__(self, params, config: t5.T5Config):
        self.params, self.net = params, t5.T5(config)
        self.mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])

    def __call__(self, inputs: Sequence[np.ndarray], beams: int = 1) -> Answers:
        how = decode.Decoding("beam", beam_size=beams) if beams > 1 else decode.Decoding()
        before = time.monotonic(), cpu_seconds()
        found = decode.generate(
            self.params, self.net, inputs, self.mesh, how,
            max_length=_LENGTH.value, batch_size=_ROWS.value,
        )  # fmt: skip
        wall, cpu = time.monotonic() - before[0], cpu_seconds() - before[1]
        tokens = [answers[0].tolist() for answers in found.tokens]
        return Answers(tokens, wall, cpu, log_probs=[sums[0] for sums in found.log_probs])


class Transformers:
    """The same weights in transformers, in a process that answers one request at a time."""

    def __init__(self, params, config: t5.T5Config, folder: pathlib.Path):
        export.save_hugging_face(folder, params, config)
        keep = "keep" if jax.default_backend() == "cpu" else "leave"
        self.process = subprocess.Popen(
            [sys.executable, "-c", TORCH, str(folder), keep],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        print("transformers:", self._line(), flush=True)

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("transformers ended; its error is above")
        return line.strip()

    def __call__(
        self, inputs: Sequence[np.ndarray], beams: int = 1, margins: bool = False
    ) -> Answers:
        settings = {"max_new_tokens": _LENGTH.value, "num_beams": beams, "output_logits": margins}
        if beams > 1:
            settings |= {"length_penalty": 0.0, "early_stopping": "never"}
        request = {"inputs": [i.tolist() for i in inputs], "rows": _ROWS.value}
        self.process.stdin.write(json.dumps(request | {"settings": settings}) + "\n")
        self.process.stdin.flush()
        found = json.loads(self._line())
        tokens = []
        for answer in found.pop("tokens"):
            end = answer.index(decode.EOS) if decode.EOS in answer else _LENGTH.value
            tokens.append(answer[:end])
        return Answers(tokens, **found)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def random_student() -> tuple[dict, t5.T5Config]:
    """Weights that keep every part at work, and never say EOS or padding."""
    config = dataclasses.replace(convert.released_config(_MODEL.value), dtype="float32")
    rng = np.random.default_rng(0)

    def draw(path, shape):
        value = rng.standard_normal(shape.shape, np.float32)
        name = partitioning.path_name(path)
        if name.endswith("scale"):
            return 1 + 0.1 * value
        if "embedding" in name:
            return value
        if "/query/" in name:  # attention neither even nor saturated
            value *= 2 / np.sqrt(config.head_dim)
        return value / np.sqrt(shape.shape[-2])

    params = jax.tree_util.tree_map_with_path(draw, t5.param_shapes(config))
    params["decoder"]["logits_dense"]["kernel"][:, :2] = 0
    return jax.tree.map(jax.numpy.asarray, params), config


def trained_student() -> tuple[dict, t5.T5Config]:
    folder = checkpoints.list_checkpoints(_CHECKPOINT.value)[-1]
    config = t5.T5Config(**checkpoints.read_metadata(folder)["model"])
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])
    params, _ = checkpoints.restore(
        folder, students.abstract_params(t5.T5(config), mesh), subtree="params"
    )
    return params, config


def inputs_of_the_task() -> list[np.ndarray]:
    name, _, split = _TASK.value.partition("/")
    rows = cache.RowsConfig(
        name, data_dir=_DATA_DIR.value, vocabulary=_VOCABULARY.value, cache_dir=_CACHE_DIR.value
    )
    (task,) = cache.load(rows, split or "test").tasks
    return [np.asarray(record.inputs) for record in task.read(range(len(task)))]


def rounds(what: str, ours: Ours, theirs: Transformers, inputs, **settings) -> dict:
    """Turns of both; prints medians and the ratio of each round's times."""
    turns = []
    for number in range(_ROUNDS.value + 1):
        pair = ours(inputs, **settings), theirs(inputs, **settings)
        if number:  # the first compiles
            turns.append(pair)
    mine, other = turns[-1]
    differ = sum(a != b for a, b in zip(mine.tokens, other.tokens, strict=True))
    lengths = [len(tokens) for tokens in mine.tokens]
    different = len({tuple(tokens) for tokens in mine.tokens})
    print(f"{what}: {len(inputs)} inputs, {statistics.mean(lengths):.1f} tokens an answer, at most "
          f"{max(lengths)}, {different} different; {differ} differ from transformers'")  # fmt: skip
    for name, at in (("ours", 0), ("transformers", 1)):
        walls = [turn[at].wall for turn in turns]
        print(f"  {name:13} {len(inputs) / statistics.median(walls):7.2f} examples/s, median of "
              f"{min(walls):.2f} to {max(walls):.2f} s; "
              f"{statistics.median(turn[at].cpu for turn in turns):.2f} CPU seconds")  # fmt: skip
    ratios = {
        kind: [getattr(b, kind) / getattr(a, kind) for a, b in turns] for kind in ("wall", "cpu")
    }
    print(f"  ratio of times {statistics.median(ratios['wall']):.2f} (by round "
          f"{', '.join(f'{r:.2f}' for r in ratios['wall'])}), of CPU times "
          f"{statistics.median(ratios['cpu']):.2f}", flush=True)  # fmt: skip
    return {"part": what, "inputs": len(inputs), "differ": differ} | ratios


def compare(ours: Ours, theirs: Transformers, inputs) -> None:
    """Raises ValueError where an answer differs and no tie explains it."""
    mine, other = ours(inputs), theirs(inputs, margins=True)
    wrong, tied = [], []
    for row, (a, b) in enumerate(zip(mine.tokens, other.tokens, strict=True)):
        if a == b:
            continue
        both = [*a, decode.EOS], [*b, decode.EOS]
        first = next(i for i, (x, y) in enumerate(zip(*both, strict=False)) if x != y)
        (tied if other.margins[row][first] <= TIE else wrong).append(row)
    print(f"equal: greedy, {len(inputs)} inputs, {len({tuple(t) for t in mine.tokens})} different "
          f"answers; {len(tied)} differ where the two best logits are within {TIE}, {len(wrong)} "
          "elsewhere")  # fmt: skip
    mine, other = ours(inputs, beams=4), theirs(inputs, beams=4)
    rows = [r for r, (a, b) in enumerate(zip(mine.tokens, other.tokens, strict=True)) if a != b]
    away = []
    if rows:  # what our network makes of their answers
        scores = decode.score_choices(
            ours.params, ours.net, [inputs[r] for r in rows],
            [[np.array(other.tokens[r], np.int32)] for r in rows], ours.mesh,
        )  # fmt: skip
        away = [abs(float(s[0]) - mine.log_probs[r]) for r, s in zip(rows, scores, strict=True)]
    far = [row for row, distance in zip(rows, away, strict=True) if distance > TIE]
    print(f"equal: 4 beams, {len({tuple(t) for t in mine.tokens})} different answers; "
          f"{len(rows) - len(far)} differ where the two log-probabilities are within {TIE}, "
          f"{len(far)} elsewhere", flush=True)  # fmt: skip
    if wrong or far:
        raise ValueError(f"inputs {wrong} (greedy) and {far} (beams) have other answers, no ties")


def run(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    unknown = set(_WHAT.value) - {"forced", "labels", "beams", "equal"}
    if unknown:
        raise app.UsageError(f"--what={','.join(unknown)}: it may be forced, labels, beams, equal")
    jax.config.update("jax_default_matmul_precision", "highest")  # as torch multiplies float32
    train.keep_freed_memory()
    inputs, results = inputs_of_the_task(), []
    with tempfile.TemporaryDirectory() as temporary:
        for make, parts in (
            (random_student, {"forced"}), (trained_student, {"labels", "beams", "equal"}),
        ):  # fmt: skip
            wanted = parts & set(_WHAT.value)
            if not wanted:
                continue
            if make is trained_student and not _CHECKPOINT.value:
                raise app.UsageError(f"{', '.join(wanted)}: give a student, --checkpoint=MODEL_DIR")
            params, config = make()
            ours = Ours(params, config)
            theirs = Transformers(params, config, pathlib.Path(temporary) / make.__name__)
            if "equal" in wanted:
                compare(ours, theirs, inputs[: _EXAMPLES.value])
            if "forced" in wanted:
                results.append(rounds("forced", ours, theirs, inputs[: _ROWS.value]))
            if "labels" in wanted:
                results.append(rounds("labels", ours, theirs, inputs))
            if "beams" in wanted:
                results.append(rounds("beams", ours, theirs, inputs[: _EXAMPLES.value], beams=4))
            theirs.close()
    about = record.about(("torch", "transformers"), jax.devices()[0].device_kind)
    record.save(_JSON.value, about | {"parts": results})


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
