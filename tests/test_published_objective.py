"""The published training loss, step by step, against its formula in torch, on real examples.

Ours: the packed batches of `TrainBatches`, `train_step`, `StepByStep` and `AdamW`. Theirs (see
`hugging_face_t5.train`): two padded forward passes a step and alpha times one mean loss plus
(1 - alpha) times the other, with the optimizer, schedule and clipping of Hugging Face's trainer.
Both start from the model that torch saved.
"""

import functools
import itertools
import shutil

import hugging_face_t5
import jax
import numpy as np
import pytest

from distill import cache, convert, data, objectives, optim, packing, t5, train

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def torch_there():
    """Before the other fixtures, which take seconds."""
    hugging_face_t5.require_torch()


ALPHA, LEARNING_RATE = 0.5, 5e-5  # the published ones
# Of each loss, at each step. The curves fall by a hundred times this and more.
TOLERANCE = 1e-4

STUDENT = dict(
    vocab_size=384, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2,
    num_heads=4, seed=30, **hugging_face_t5.V1_1,
)  # fmt: skip
SMALL = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8,
    num_heads=6, seed=31, **hugging_face_t5.V1_1,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(shared, tmp_path_factory):
    """CommonsenseQA with its teacher's rationales, as bytes."""
    folder = shared / "datasets"
    if not (folder / "cqa").is_dir():
        pytest.skip(f"no CommonsenseQA in {folder}")
    rows = cache.RowsConfig(
        "cqa_step_by_step", data_dir=str(folder), vocabulary="bytes",
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    return cache.load(rows, "train")


def batches_of(corpus, model, pairs, steps):
    """The first batches of an epoch, and the batch object that knows their examples."""
    config = data.DataConfig(corpus.name, vocabulary="bytes", batch_size=None, pairs_per_step=pairs)
    batches = data.TrainBatches(corpus, config, packing.Flops.of(model))
    return batches, list(itertools.islice(batches.iterate(data.Position()), steps))


def padded(batches, taken):
    """The same examples for torch: {predict,explain}_{inputs,targets} [steps, pairs, length].

    Not unpacked from our batches, but looked up by example among the tokenised rows, so that what
    packing does to them is compared too.
    """
    rows = {}  # (stream, example): tokens
    for task in batches.corpus.tasks:
        groups = np.unique(task.loss_groups)
        assert len(groups) == 1
        stream = ("predict", "explain")[groups[0]]
        for record in task.read(range(len(task))):
            rows[stream, record.example_id] = {"inputs": record.inputs, "targets": record.targets}
    examples = [sorted(set(batches.example_ids(batch.sequences))) for batch in taken]
    arrays = {}
    for stream, side in itertools.product(("predict", "explain"), ("inputs", "targets")):
        found = [[rows[stream, e][side] for e in of_step] for of_step in examples]
        width = max(len(tokens) for of_step in found for tokens in of_step)
        assert width <= data.MAX_LENGTHS[side]  # nothing was cut
        array = np.zeros((len(found), len(found[0]), width), np.int32)
        for step, pair in np.ndindex(array.shape[:2]):
            array[step, pair, : len(found[step][pair])] = found[step][pair]
        arrays[f"{stream}_{side}"] = array
    return arrays


def train_ours(folder, taken):
    """Trains on packed batches; returns the loss curves, the parameters before and after."""
    weights = convert.open_weights(folder / "model")
    model, before = weights.model, convert.read_params(weights)
    assert model.dropout_rate == 0 and model.compute_dtype == np.float32
    tx = optim.AdamW(learning_rate=LEARNING_RATE).build(len(taken))
    step = jax.jit(
        functools.partial(
            train.train_step, net=t5.T5(model), tx=tx,
            objective=objectives.StepByStep(alpha=ALPHA, z_loss=0.0),
        )
    )  # fmt: skip
    state = train.TrainState(np.int32(0), before, tx.init(before))
    scalars = []
    for batch in taken:
        state, of_step = step(state, batch.arrays, jax.random.key(0))
        scalars.append(jax.device_get(of_step))
    names = dict(total="loss", label="cross_ent_loss/label", rationale="cross_ent_loss/rationale",
                 grad_norm="grad_norm")  # fmt: skip
    curves = {name: np.array([s[ours] for s in scalars]) for name, ours in names.items()}
    return curves, before, jax.device_get(state.params)


def compare(corpus, sizes, pairs, steps, folder):
    """Trains both; prints and checks how far apart they are."""
    request = {"alpha": ALPHA, "learning_rate": LEARNING_RATE}
    hugging_face_t5.ask(folder, {"task": "make", "sizes": sizes})
    model = convert.open_weights(folder / "model").model
    batches, taken = batches_of(corpus, model, pairs, steps)
    arrays = padded(batches, taken)
    theirs, _ = hugging_face_t5.ask(folder, {"task": "train"} | request, arrays)
    ours, before, after = train_ours(folder, taken)

    assert all(batch.examples == pairs for batch in taken) and len(taken) == steps
    segments = np.concatenate([b.arrays["decoder_segment_ids"].max(axis=1) for b in taken])
    print(f"{segments[segments > 0].mean():.1f} sequences in a row, at most {segments.max()}")
    assert segments.max() > 1  # packed
    for name, curve in ours.items():
        difference = np.abs(curve / theirs[name] - 1).max()
        print(f"{name}: {curve[0]:.4f} to {curve[-1]:.4f}, within {difference:.1e} of torch's")
        # The norm of a gradient sums up the float32 noise of all of it.
        assert difference <= TOLERANCE * (10 if name == "grad_norm" else 1), name
    assert theirs["grad_norm"].max() > 1  # clipping was at work

    # What training did to the parameters, too: a curve forgives an update that is small.
    trained = convert.read_params(convert.open_weights(folder / "trained"))

    def distance(a, b):
        squares = jax.tree.map(lambda x, y: np.sum(np.square(x - y, dtype=np.float64)), a, b)
        return np.sqrt(sum(jax.tree.leaves(squares)))

    apart, moved = distance(after, trained), distance(trained, before)
    print(f"parameters moved by {moved:.3g} and lie {apart / moved:.1e} of that apart")
    assert apart <= 1e-3 * moved  # a weight decay of 0.01, say, would be 0.004
    return ours


def test_twenty_published_steps_have_the_losses_of_the_formula(corpus, tmp_path):
    ours = compare(corpus, STUDENT, pairs=4, steps=20, folder=tmp_path)
    for name in ("total", "label", "rationale"):  # there was something to compare
        assert ours[name][-5:].mean() < 0.99 * ours[name][:5].mean()


@pytest.mark.slow
def test_the_same_at_the_size_of_t5_1_1_small(corpus, tmp_path):
    # 20 steps of 4 pairs: losses within 3.4e-6, parameters 4.3e-5 of their way apart.
    compare(corpus, SMALL, pairs=2, steps=10, folder=tmp_path)
    shutil.rmtree(tmp_path)  # 600 MB
