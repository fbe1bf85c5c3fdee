"""The published method's training step with torch and transformers, in a process of its own.

`Published` starts this file as a process and talks to it, one JSON line a request, one an answer;
only that process imports torch. The step is that of Hsieh et al. 2023: two forward passes, one
over the inputs that ask for a label and one over those that ask for a rationale, each padded to the
longest of its batch; alpha CE(label) + (1 - alpha) CE(rationale), each the mean over its own real
targets as transformers computes it; backward; the gradient's norm clipped at 1; AdamW.

A batch is `{"predict": [[inputs, targets], ...], "explain": [...]}`, lists of token ids with their
EOS. A time is from token ids to updated parameters.
"""

import dataclasses
import json
import subprocess
import sys
from typing import Any

Stream = list[tuple[list[int], list[int]]]
Batch = dict[str, Stream]
STREAMS = ("predict", "explain")
IGNORED = -100  # in transformers' labels


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the process computes with.

    Attributes:
      weights: folder in Hugging Face's format; None = random ones of `sizes`.
      sizes: of transformers' T5Config.
      dtype: `bfloat16` is torch's autocast over float32 parameters.
      compiled: with torch.compile.
      learning_rate: of AdamW, without weight decay.
      alpha: weight of the label's loss.
      keep_freed_memory: as `distill.train.keep_freed_memory`, before torch is imported.
    """

    weights: str | None = None
    sizes: dict[str, Any] | None = None
    dtype: str = "float32"
    compiled: bool = False
    learning_rate: float = 5e-5
    alpha: float = 0.5
    keep_freed_memory: bool = False


def sizes_of(model: Any) -> dict[str, Any]:
    """transformers' names for the sizes of a `t5.T5Config` with a gated feed-forward block."""
    return {
        "vocab_size": model.vocab_size, "d_model": model.emb_dim, "d_kv": model.head_dim,
        "d_ff": model.mlp_dim, "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers, "num_heads": model.num_heads,
        "feed_forward_proj": "gated-gelu", "dropout_rate": model.dropout_rate,
        "tie_word_embeddings": False, "decoder_start_token_id": 0,
    }  # fmt: skip


def examples_of(batches: Any, batch: Any) -> Batch:
    """The examples of one of our batches as token ids.

    They are looked up by their number among the tokenised rows, not taken out of packed rows.

    Args:
      batches: `data.TrainBatches`.
      batch: one that it gave.
    """
    from distill import data  # only where there are such batches

    found: Batch = {stream: [] for stream in STREAMS}
    limits = [min(data.MAX_LENGTHS[side], n) for side, n in batches.capacity.items()]
    chosen, first = sorted(batch.sequences.tolist()), 0
    for task in batches.corpus.tasks:
        mine = [n - first for n in chosen if first <= n < first + len(task)]
        for group, tokens in zip(task.loss_groups[mine], task.read_tokens(mine), strict=True):
            sides = (data.truncate(*side).tolist() for side in zip(tokens, limits, strict=True))
            found[STREAMS[group]].append(tuple(sides))
        first += len(task)
    return found


class Published:
    """The process, from outside.

    Attributes:
      facts: device, threads and the kind of attention, as the process told them at its start.
    """

    def __init__(self, settings: Settings):
        """Starts it and waits until the model is there.

        Raises:
          RuntimeError: it ended; its error is on stderr.
        """
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # other lines are a library's
                return json.loads(line)
        raise RuntimeError(f"torch's process ended with {self._process.wait()}; its error is above")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Has it answer one request: `loss`, `steps`, `products` or `memory`."""
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> "Published":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- In the process -------------------------------------------------------------------------------


def serve(settings: Settings) -> None:
    """Answers requests until its input ends."""
    if settings.keep_freed_memory:
        import ctypes

        libc = ctypes.CDLL(None)
        for name, value in ((-1, -1), (-2, 256 << 20), (-4, 0)):  # as distill.train's
            libc.mallopt(name, value)
    import time

    import record
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    library = transformers.T5ForConditionalGeneration
    if settings.weights:
        model = library.from_pretrained(settings.weights)
    else:
        with device:  # large ones are drawn where they are used
            model = library(transformers.T5Config(**settings.sizes))
        # transformers 5 ties the logits of every fresh T5, and only loading unties them.
        untied = torch.empty_like(model.shared.weight).normal_(
            std=settings.sizes["d_model"] ** -0.5
        )
        model.lm_head.weight = torch.nn.Parameter(untied)
    model = model.to(device=device, dtype=torch.float32)
    half = settings.dtype == "bfloat16"
    # Before it is compiled: the optimizer wants the model's own parameters.
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    network = torch.compile(model) if settings.compiled else model

    def tensors(batch: Batch) -> dict[str, list[tuple["torch.Tensor", ...]]]:
        """As a data set hands them out; this is not timed."""
        return {
            stream: [tuple(map(torch.tensor, pair)) for pair in batch[stream]] for stream in STREAMS
        }

    def padded(sequences: list["torch.Tensor"], value: int) -> "torch.Tensor":
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

    def losses(batch: dict[str, list]) -> tuple[list["torch.Tensor"], int]:
        """Of both streams, and the positions that were computed."""
        found, positions = [], 0
        for stream in STREAMS:
            inputs, targets = zip(*batch[stream], strict=True)
            inputs, labels = padded(inputs, 0), padded(targets, IGNORED)
            positions += inputs.numel() + labels.numel()
            inputs, labels = inputs.to(device), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                output = network(
                    input_ids=inputs, attention_mask=(inputs > 0).long(), labels=labels
                )
            found.append(output.loss)
        return found, positions

    def total(parts: list["torch.Tensor"]) -> "torch.Tensor":
        return settings.alpha * parts[0] + (1 - settings.alpha) * parts[1]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def loss(batch: Batch) -> dict[str, Any]:
        """Without dropout and without an update."""
        model.eval()
        with torch.no_grad():
            parts, _ = losses(tensors(batch))
        return {"loss": float(total(parts)), "parts": [float(part) for part in parts]}

    def steps(batches: list[Batch]) -> dict[str, Any]:
        """Updates, one for each batch; the device is waited for at their end."""
        model.train()
        batches = [tensors(batch) for batch in batches]
        wait()
        start, positions = record.clock(), 0
        for batch in batches:
            parts, computed = losses(batch)
            positions += computed
            value = total(parts)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        wait()
        end = record.clock()
        return {
            "wall": end[0] - start[0], "cpu": end[1] - start[1], "positions": positions,
            "loss": float(value.detach()),
        }  # fmt: skip

    def products(shape: list[int], dtype: str, times: int) -> dict[str, Any]:
        """Seconds of `times` matrix products [m, k] x [k, n]."""
        m, k, n = shape
        a, b = (torch.randn(s, device=device).to(getattr(torch, dtype)) for s in ((m, k), (k, n)))
        a @ b
        wait()
        start = time.monotonic()
        for _ in range(times):
            a @ b
        wait()
        return {"wall": time.monotonic() - start}

    def memory() -> dict[str, Any]:
        on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        return {"rss": record.peak_rss(), "device": on_device}

    answers = {"loss": loss, "steps": steps, "products": products, "memory": memory}
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    serve(Settings(**json.loads(sys.argv[1])))
