r"""From the start of the process to the end of the first step, beside torch.

    python scripts/benchmarks/startup.py --data_dir=/data --vocabulary=/data/spiece.model

Each contestant is a process of its own, timed from outside until it has told that its first step
has ended, and stopped then; rounds are interleaved, and the table holds medians. CPU seconds are
those of all cores together; on a machine that others use they vary less.

  cold   scripts/train.py with t5_1_1/small.gin and step_by_step.gin: tokenised rows are there,
         compiled programs are not
  warm   the same with compiled programs, as from the second start on
  torch  the published method with transformers, where both are installed: a predict and an explain
         batch padded to their longest, weighted sum of the losses, AdamW, float32

All take the same examples, those of our first step, with the same vocabulary and number of
parameters. Ours opens the tokenised data set and plans the epoch; torch is handed the text of its
one batch. Ours packs, torch pads; both compute padding, and both draw dropout masks.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import record
from absl import app, flags

from distill import cache, data, packing, t5, vocabulary

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "A SentencePiece model.", required=True)
_MIXTURE = flags.DEFINE_string("mixture", "cqa_step_by_step", "What to train on.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Of this benchmark; a fresh one otherwise.")
_PAIRS = flags.DEFINE_integer("pairs", 16, "Examples of the step.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; medians are shown.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for every measurement.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
# gin_configs/models/t5_1_1/small.gin.
SMALL = t5.T5Config(vocab_size=32128)
LIMIT = 900  # seconds

TORCH = """
import json, sys
import sentencepiece, torch, transformers
batches = json.load(open(sys.argv[1]))
pieces = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
model = transformers.T5ForConditionalGeneration(transformers.T5Config(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
    feed_forward_proj="gated-gelu", dropout_rate=0.1, tie_word_embeddings=False,
    decoder_start_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
model.train()

def padded(texts, with_):
    ids = [torch.tensor(pieces.encode(text) + [1]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=with_)

def loss(batch):
    inputs = padded(batch["inputs"], 0)
    return model(input_ids=inputs, attention_mask=(inputs > 0).long(),
                 labels=padded(batch["targets"], -100)).loss

total = 0.5 * loss(batches["predict"]) + 0.5 * loss(batches["explain"])
total.backward()
optimizer.step()
print("first step", float(total), flush=True)
import time; time.sleep(3600)
"""


def ours(model_dir: pathlib.Path, cache_dir: str) -> list[str]:
    settings = {
        "MIXTURE_OR_TASK_NAME": _MIXTURE.value, "MODEL_DIR": model_dir, "CACHE_DIR": cache_dir,
        "VOCABULARY": _VOCABULARY.value, "PAIRS_PER_STEP": _PAIRS.value, "TRAIN_STEPS": 1,
        "EVAL_STEPS": 1, "EVALUATOR_NUM_EXAMPLES": 1,
    } | ({"DATA_DIR": _DATA_DIR.value} if _DATA_DIR.value else {})  # fmt: skip
    files = ["--gin_file=t5_1_1/small.gin", "--gin_file=step_by_step.gin"]
    settings = [f"--gin.{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(ROOT / "scripts/train.py"), *files, *settings]


def first_batch(cache_dir: str) -> dict[str, dict[str, list[str]]]:
    """The texts of our first step, by task."""
    config = data.DataConfig(
        _MIXTURE.value, data_dir=_DATA_DIR.value, vocabulary=_VOCABULARY.value,
        cache_dir=cache_dir, batch_size=None, pairs_per_step=_PAIRS.value,
    )  # fmt: skip
    corpus = cache.load(config, "train")
    batches = data.TrainBatches(corpus, config, packing.Flops.of(SMALL))
    chosen = next(batches.iterate(data.Position())).sequences
    pieces, texts, first = vocabulary.load(_VOCABULARY.value), {}, 0
    for task in corpus.tasks:
        rows = task.read([i - first for i in sorted(chosen) if first <= i < first + len(task)])
        texts["explain" if 1 in task.loss_groups else "predict"] = {
            "inputs": [row.text for row in rows],
            "targets": [pieces.decode(row.targets) for row in rows],
        }
        first += len(task)
    return texts


def seconds(command: list[str], is_done) -> tuple[float, float]:
    """Wall and CPU seconds from the start of a process until `is_done(its output)`."""
    with tempfile.TemporaryFile("w+") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            while not is_done(output.fileno()):
                if process.poll() is not None or time.monotonic() - started > LIMIT:
                    output.seek(0)
                    raise RuntimeError(f"{command[:3]} did not come to a step:\n{output.read()}")
                time.sleep(0.01)
            wall = time.monotonic() - started
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return wall, usage.ru_utime + usage.ru_stime


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        cache_dir = _CACHE_DIR.value or str(folder / "cache")
        metrics = folder / "run" / "train" / "metrics.jsonl"
        programs = pathlib.Path(cache_dir).expanduser() / "programs"

        def run_ours(is_cold: bool) -> tuple[float, float]:
            shutil.rmtree(folder / "run", ignore_errors=True)
            if is_cold:
                shutil.rmtree(programs, ignore_errors=True)
            return seconds(ours(folder / "run", cache_dir), lambda _: metrics.exists())

        def run_torch() -> tuple[float, float]:
            command = [sys.executable, "-c", TORCH, str(folder / "batch"), _VOCABULARY.value]
            return seconds(command, lambda file: b"first step" in os.pread(file, 1 << 16, 0))

        contestants = {"cold": lambda: run_ours(True), "warm": lambda: run_ours(False)}
        run_ours(True)  # tokenises
        if all(map(importlib.util.find_spec, ("torch", "transformers"))):
            contestants["torch"] = run_torch
            (folder / "batch").write_text(json.dumps(first_batch(cache_dir)))
        else:
            print("torch: left out, since torch and transformers are not installed")

        measured = {name: [] for name in contestants}
        for _ in range(_ROUNDS.value):
            for name, run in contestants.items():
                measured[name].append(run())
                print(name, *(f"{x:.1f}" for x in measured[name][-1]), file=sys.stderr, flush=True)

    rows = []
    for name, results in measured.items():
        wall, cpu = map(record.median, zip(*results, strict=True))
        ratios = [
            mine[0] / torch[0]
            for mine, torch in zip(results, measured.get("torch", []), strict=False)
        ]
        rows.append((name, wall, cpu, record.median(ratios)))
    print(f"{_PAIRS.value} pairs of {_MIXTURE.value}, {_ROUNDS.value} rounds")
    print(record.table(("", "seconds", "CPU seconds", "of torch"), rows))
    about = record.about(("torch", "transformers"))
    record.save(_JSON.value, about | {"pairs": _PAIRS.value, "measured": measured})


if __name__ == "__main__":
    app.run(main)
