"""Evaluations as a run of three students on three data sets leaves them, made up from a seed.

Not measured on anything: texts are from templates, and a student's chance to be right grows with
its step. `python tests/evaluation_results.py FOLDER` writes them for a look at the report.
"""

import hashlib
import json
import math
import pathlib
import sys

import numpy as np

RUNS = {  # MODEL_DIR -> parameters, skill at the end
    "/runs/labels/small": (76_961_152, -0.25),
    "/runs/step_by_step/small": (76_961_152, 0.25),
    "/runs/step_by_step/base": (247_577_856, 0.75),
}
STEPS = (500, 1000, 1500, 2000, 2500)
TEACHER_ACCURACY = {"cqa": 0.72, "esnli": 0.58, "svamp": 0.64}


def svamp(rng):
    name, thing = rng.choice(["Ann", "Bob", "Mia", "Tom"]), rng.choice(["nuts", "books", "eggs"])
    a, b = (int(n) for n in rng.integers(2, 90, 2))
    a, b = max(a, b) + 1, min(a, b)
    gold = f"( {a}.0 - {b}.0 )"
    wrong = [f"( {a}.0 + {b}.0 )", f"( {b}.0 - {a}.0 )", f"( {a} - {b}", f"{a - b}.0 {thing}"]
    text = f"{name} had {a} {thing}.\nThen {b} of them were lost on the way home."
    reason = (
        f"{name} started with {a} {thing} and {b} were lost, so {a} minus {b} {thing} are left. "
        "The answer is the difference of the two numbers."
    )
    return f"{text}\nHow many {thing} does {name} have now?", gold, wrong, reason


def cqa(rng):
    places = rng.permutation(["a river", "the office", "a garden shed", "the attic", "a theatre",
                              "downtown", "an airport", "the pantry"])[:5]  # fmt: skip
    gold, *wrong = map(str, places)
    shown = [str(p) for p in rng.permutation(places)]
    thing = rng.choice(["a ladder", "old letters", "a canoe", "many desks", "a stage"])
    letters = "\n".join(f"({letter}) {place}" for letter, place in zip("abcde", shown, strict=True))
    text = f"Where would you most likely find {thing} that nobody has used for years?"
    reason = (
        f"The answer must be a place that holds {thing}. Of the above choices, only {gold} is a "
        "place where it would be kept and forgotten."
    )
    return f"{text}\nAnswer Choices:\n{letters}", gold, wrong, reason


def esnli(rng):
    who = rng.choice(["A woman in a green headscarf", "Two children", "A man with a dog"])
    what = rng.choice(["walk along the beach", "wait for a train", "sing in a choir"])
    labels = ["entailment", "neutral", "contradiction"]
    gold = str(rng.choice(labels))
    second = {
        "entailment": "Somebody is outside or among other people.",
        "neutral": "They have known each other since school.",
        "contradiction": "Nobody is there.",
    }[gold]
    reason = f"The premise says that {who[0].lower() + who[1:]} {what}; the hypothesis is {gold}."
    text = f"premise: {who} {what}.\nhypothesis: {second}"
    return text, gold, [label for label in labels if label != gold], reason


def examples(dataset: str, split: str, n: int, seed: int = 0) -> list[dict]:
    """What all students of a data set share, and how hard each example is."""
    rng = np.random.default_rng([seed, *f"{dataset}/{split}".encode()])
    made = []
    for i in range(n):
        text, gold, wrong, reason = {"svamp": svamp, "cqa": cqa, "esnli": esnli}[dataset](rng)
        knows = rng.random() < TEACHER_ACCURACY[dataset]
        made.append({
            "example_id": f"{dataset}/{split}/{i}", "input": text, "label": gold, "wrong": wrong,
            "teacher": gold if knows else str(rng.choice(wrong)),
            "teacher_rationale": reason if knows else f"{reason.split('.')[0]}. I am not sure.",
            "hard": rng.normal(0.2, 1.0),
        })  # fmt: skip
    return made


def predict(example: dict, skill: float, rng) -> dict:
    right = bool(rng.random() < 1 / (1 + math.exp(-2.5 * (skill - example["hard"]))))
    said = example["label"] if right else str(rng.choice(example["wrong"]))
    rationale = example["teacher_rationale"] if right else example["teacher_rationale"][:60]
    shared = ("example_id", "input", "label", "teacher", "teacher_rationale", "human_rationale")
    return {name: example.get(name) for name in shared} | {
        "prediction": said, "generated": said, "correct": right, "rationale": rationale,
        "probability": round(float(rng.beta(6, 2) if right else rng.beta(3, 4)), 4),
    }  # fmt: skip


def line(split: str, dataset: str, metric: str, right: list[bool], **fields) -> dict:
    value, n = float(np.mean(right)), len(right)
    error = math.sqrt(max(value * (1 - value), 1e-9) / n)
    low, high = max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)
    name = json.dumps([fields.get("run"), fields.get("step"), fields.get("task"), dataset, split])
    return {
        "key": hashlib.sha256(name.encode()).hexdigest()[:16], "dataset": dataset, "split": split,
        "metric": metric, "value": value, "n": n, "standard_error": error, "low": low,
        "high": high, "mixture": "all_step_by_step", "time": "2026-11-21T22:50:00Z", **fields,
    }  # fmt: skip


def write(
    folder, n: int = 200, seed: int = 0, datasets=tuple(TEACHER_ACCURACY), steps=STEPS, edit=None
):
    """Writes FOLDER/<run>/inference_eval/results.jsonl and the predictions beside it.

    Args:
      folder: where to.
      n: examples of each split.
      seed: of everything.
      datasets: some of `TEACHER_ACCURACY`.
      steps: of the checkpoints.
      edit: changes an example before it is predicted, given (dataset, split, position, example).
    """
    rng = np.random.default_rng(seed)
    shared = {
        (dataset, split): examples(dataset, split, n, seed)
        for dataset in datasets
        for split in ("validation", "test")
    }
    for (dataset, split), made in shared.items():
        for i, example in enumerate(made):
            if edit:
                edit(dataset, split, i, example)
    for run, (parameters, skill) in RUNS.items():
        output = pathlib.Path(folder) / run.removeprefix("/runs/") / "inference_eval"
        lines = []
        for (dataset, split), made in shared.items():
            said = [example["teacher"] == example["label"] for example in made]
            lines.append(
                line(split, dataset, "accuracy", said, run="teacher", task=None, step=None)
            )
            for step in steps:
                # Rises, and falls a little at the end.
                at = skill - 2.2 * math.exp(-step / 700) - 0.15 * max(0, step - 2000) / 500
                rows = [predict(example, at, rng) for example in made]
                task, path = f"{dataset}_predict", f"{split}/{dataset}_predict-{step:06d}.jsonl"
                fields = dict(
                    run=run, task=task, step=step, checkpoint=f"checkpoint_{step}",
                    parameters=parameters, tokens=step * 7616, decoder="greedy", predictions=path,
                )  # fmt: skip
                right = [row["correct"] for row in rows]
                lines.append(line(split, dataset, "accuracy", right, **fields))
                if dataset == "svamp":
                    odd = [row["prediction"].count("(") != row["prediction"].count(")")
                           for row in rows]  # fmt: skip
                    lines.append(line(split, dataset, "unparsed", odd, **fields))
                (output / path).parent.mkdir(parents=True, exist_ok=True)
                (output / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (output / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


if __name__ == "__main__":
    write(sys.argv[1])
