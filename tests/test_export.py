"""Weights out: bitwise in every direction, whole or not at all, and the command for it."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from test_convert import MODEL, OLD, assert_same_tree, random_params

from distill import convert, export, vocabulary
from distill.formats import hugging_face, t5x

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write(kind, folder, weights):
    if kind == "ours":
        return export.save_ours(folder, weights)
    if kind == "t5x":
        return export.save_t5x(folder, weights, weights.model, weights.step, weights.slots)
    export.save_hugging_face(folder, weights, weights.model)
    return folder


# From Hugging Face's; both together have every step from one format to another.
ROUTES = [
    ("ours", "t5x", "hugging_face", "ours"),
    ("t5x", "ours", "hugging_face", "t5x"),
]


@pytest.mark.parametrize("route", ROUTES, ids="-".join)
@pytest.mark.parametrize("model", [MODEL, OLD], ids=["1.1", "1.0"])
def test_every_direction_is_bitwise(tmp_path, route, model):
    params = random_params(model)
    source = tmp_path / "0"
    export.save_hugging_face(source, params, model)
    for i, kind in enumerate(route, start=1):
        weights = convert.open_weights(str(source))
        same = dataclasses.replace(weights.model, dtype="float32", dropout_rate=0.0)
        assert same == model
        source = write(kind, tmp_path / str(i), weights)
    assert_same_tree(convert.read_params(convert.open_weights(str(source))), params)


@pytest.mark.parametrize("route", ROUTES, ids="-".join)
def test_t5xs_own_checkpoint_in_every_direction(shared, tmp_path, route):
    source = shared / "fixtures/t5x_tiny/checkpoint_dir/checkpoint_1000"
    first = convert.open_weights(str(source))
    params = convert.read_params(first)
    assert first.model.num_heads == 4 and first.step == 1000
    for i, kind in enumerate(route):
        source = write(kind, tmp_path / str(i), convert.open_weights(str(source)))
    assert_same_tree(convert.read_params(convert.open_weights(str(source))), params)


def test_adafactors_slots_survive_t5x_to_t5x(shared, tmp_path):
    source = shared / "fixtures/t5x_tiny/checkpoint_dir/checkpoint_1000"
    first = convert.open_weights(str(source), slots=True)
    folder = write("t5x", tmp_path / "x", first)
    second = convert.open_weights(str(folder), slots=True)
    assert folder.name == "checkpoint_1000" and second.slots.keys() == first.slots.keys()
    for name, tensor in first.slots.items():
        assert second.slots[name].whole().tobytes() == tensor.whole().tobytes(), name
    names = [t5x.open_checkpoint(x, slots=True).slots.keys() for x in (source, folder)]
    assert names[0] == names[1]  # the momentum that T5X keeps beside them as well


def test_the_config_says_what_both_generations_of_transformers_read(tmp_path):
    for model, tied in ((MODEL, False), (OLD, True)):
        export.save_hugging_face(tmp_path / str(tied), random_params(model), model)
        config = json.loads((tmp_path / str(tied) / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied and config["scale_decoder_outputs"] is tied
        assert config["feed_forward_proj"] == ("relu" if tied else "gated-gelu")
        assert config["num_layers"] == 2 and config["num_decoder_layers"] == 3
        names = hugging_face.open_folder(tmp_path / str(tied)).tensors
        assert ("lm_head.weight" in names) is not tied and "shared.weight" in names
        generation = json.loads((tmp_path / str(tied) / "generation_config.json").read_text())
        assert generation == {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    swish = dataclasses.replace(MODEL, mlp_activations=("silu", "gelu"))
    with pytest.raises(ValueError, match="no T5 with activations"):
        export.save_hugging_face(tmp_path / "x", random_params(swish), swish)


def test_shards(tmp_path):
    export.save_hugging_face(tmp_path / "x", random_params(MODEL), MODEL, max_shard_bytes=8000)
    files = [path.name for path in (tmp_path / "x").glob("*.safetensors")]
    assert len(files) > 3 and (tmp_path / "x" / "model.safetensors.index.json").exists()
    weights = convert.open_weights(str(tmp_path / "x"))
    assert_same_tree(convert.read_params(weights), random_params(MODEL))


@pytest.mark.parametrize("mask,folder,file", [(0o022, 0o755, 0o644), (0o007, 0o770, 0o660)])
def test_others_may_read_it(tmp_path, mask, folder, file):
    old = os.umask(mask)
    try:
        export.save_hugging_face(tmp_path / "x", random_params(MODEL), MODEL)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == folder
    for path in (tmp_path / "x").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == file, path


# ---- whole or not at all ------------------------------------------------------------------------


def test_what_exists_is_not_overwritten(tmp_path):
    params = random_params(MODEL)
    (tmp_path / "x").mkdir()
    export.save_hugging_face(tmp_path / "x", params, MODEL)  # empty is fine
    export.save_t5x(tmp_path / "y", params, MODEL, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export.save_hugging_face(tmp_path / "x", params, MODEL)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export.save_t5x(tmp_path / "y", params, MODEL, 2)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export.save_ours(tmp_path / "x", convert.open_weights(str(tmp_path / "y")))
    with pytest.raises(ValueError, match="is of step 2"):
        export.save_t5x(tmp_path / "checkpoint_3", params, MODEL, 2)
    with pytest.raises(ValueError, match="local folder"):
        export.save_hugging_face("gs://bucket/x", params, MODEL)


def test_an_export_that_reads_back_otherwise_is_thrown_away(tmp_path, monkeypatch):
    params = random_params(MODEL)
    write_safetensors, config = hugging_face.write_safetensors, export._config

    def garble(folder, tensors, **settings):
        name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
        wrong = tensors[name].whole().copy()
        wrong[3, 4] = np.nextafter(wrong[3, 4], np.float32(9))  # one bit
        return write_safetensors(folder, tensors | {name: export.tensors.of(wrong)}, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "write_safetensors", garble)
        with pytest.raises(ValueError, match="encoder/layers/mlp/wo/kernel did not come back"):
            export.save_hugging_face(tmp_path / "x", params, MODEL)
    with monkeypatch.context() as patch:  # the arrays alone are right
        patch.setattr(export, "_config", lambda m: config(m) | {"feed_forward_proj": "gated-silu"})
        with pytest.raises(ValueError, match="the logits of .* are not those"):
            export.save_hugging_face(tmp_path / "x", params, MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "write_safetensors", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.save_hugging_face(tmp_path / "x", params, MODEL)
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_quicker_stays(tmp_path, monkeypatch):
    """Two of one name: nothing of the first is lost, the second is told."""
    params, same = random_params(MODEL), export._require_same

    def meanwhile(*arguments):
        same(*arguments)
        monkeypatch.undo()
        export.save_hugging_face(tmp_path / "x", params, MODEL)

    monkeypatch.setattr(export, "_require_same", meanwhile)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export.save_hugging_face(tmp_path / "x", random_params(MODEL, 1), MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert_same_tree(convert.read_params(convert.open_weights(str(tmp_path / "x"))), params)


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export.save_hugging_face(tmp_path / "link", random_params(MODEL), MODEL)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


def test_parameters_that_are_not_the_models(tmp_path):
    with pytest.raises(ValueError, match="decoder/layers/mlp/wi/kernel"):
        export.save_hugging_face(tmp_path / "x", random_params(OLD), MODEL)
    with pytest.raises(ValueError, match="has 259 ids, the model only 250"):
        export.save_hugging_face(
            tmp_path / "x", random_params(MODEL), MODEL, vocabulary.load("bytes")
        )
    assert not list(tmp_path.iterdir())


# ---- tokenizers ---------------------------------------------------------------------------------


def test_the_tokenizer_goes_with_it(tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=384)
    export.save_hugging_face(
        tmp_path / "bytes", random_params(model), model, vocabulary.load("bytes")
    )
    settings = json.loads((tmp_path / "bytes" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "ByT5Tokenizer"
    assert settings["extra_ids"] == 125  # 384 ids in all, as the released ones
    assert convert.open_weights(str(tmp_path / "bytes")).vocabulary == "bytes"


# ---- the command --------------------------------------------------------------------------------


def command(*arguments, **settings):
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "scripts", "convert_checkpoint.py"), *arguments],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", **settings},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_command(tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=384)
    params = random_params(model)
    export.save_hugging_face(tmp_path / "hf", params, model, vocabulary.load("bytes"))
    code, output = command(str(tmp_path / "hf"), str(tmp_path / "ours"))
    assert code == 0, output
    assert "Hugging Face, step 0" in output and "INITIAL_CHECKPOINT_PATH=" in output
    assert "--gin.T5Config.emb_dim=12" in output
    weights = convert.open_weights(str(tmp_path / "ours"))
    assert (weights.kind, weights.vocabulary) == (convert.OURS, "bytes")
    assert_same_tree(convert.read_params(weights), params)
    code, output = command(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert code == 0 and "read back and equal" in output, output
    for name in ("model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    code, output = command(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert code == 2 and "is not an empty folder" in output and "Traceback" not in output, output


def test_the_command_to_t5x_and_from_it(tmp_path, shared):
    source = shared / "fixtures/t5x_tiny/checkpoint_dir"
    code, output = command("--to=t5x", str(source), str(tmp_path / "t5x"))
    assert code == 0 and "with Adafactor's second moments" in output, output
    assert convert.open_weights(str(tmp_path / "t5x"), slots=True).slots
    code, output = command("--to=hugging_face", "--vocabulary=bytes",
                           "--mlp_activations=silu,linear", str(tmp_path / "t5x"),
                           str(tmp_path / "hf"))  # fmt: skip
    assert code == 0, output
    assert "is assumed" not in output
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["feed_forward_proj"] == "gated-silu"
    assert (tmp_path / "hf" / "tokenizer_config.json").exists()
    # From one folder of Hugging Face's to another, the tokenizer goes along.
    (tmp_path / "hf" / "tokenizer.json").write_text('{"some": "tokenizer"}')
    code, output = command("--to=hugging_face", str(tmp_path / "hf"), str(tmp_path / "hf2"))
    assert code == 0 and (tmp_path / "hf2" / "tokenizer.json").exists(), output


def test_a_command_that_is_stopped_leaves_nothing(tmp_path):
    export.save_hugging_face(tmp_path / "hf", random_params(MODEL), MODEL)
    arguments = [sys.executable, os.path.join(ROOT, "scripts", "convert_checkpoint.py"),
                 "--to=t5x", str(tmp_path / "hf"), str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(arguments, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob(".checkpoint_0.*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    "arguments,message",
    [(["only"], "FROM and TO"), (["/absent/x", "y"], "No checkpoint at"),
     (["--mlp_activations=relu", "hf", "y"], "is for T5X")],
)  # fmt: skip
def test_mistakes_on_the_command_line(tmp_path, arguments, message):
    export.save_hugging_face(tmp_path / "hf", random_params(MODEL), MODEL)
    arguments = [str(tmp_path / x) if x in ("hf", "y") else x for x in arguments]
    code, output = command(*arguments)
    assert code == 2 and message in output and "Traceback" not in output, output
