"""Model folders: exact round trips, strict loading, readable without this project."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.data.genes import GeneVocabulary
from sct.errors import CheckpointError, MissingExtraError, StoreError
from sct.models.sct import SCT, SCTConfig
from sct.nn.paths import flatten, unflatten
from sct.tasks.masked_expression import MaskedExpression
from sct.train.experiment import run
from sct.train.sharding import RULES, MeshConfig, make_mesh
from sct.weights import pretrained

ROOT = Path(__file__).resolve().parents[2]
CONFIG = SCTConfig(
    num_genes=64, token_embed_dim=32, embed_dim=32, num_downsamples=2, num_layers=1, num_heads=2, ffn_dim=48
)


@pytest.fixture(scope="module")
def model():
    variables = nn.unbox(SCT(CONFIG).init(jax.random.key(3), jnp.zeros((1, 1, 64), jnp.uint8)))
    genes = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[:60])
    return pretrained.Pretrained("sct", CONFIG, variables, genes, license="cc0-1.0")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def equal(first, second):
    one, two = flatten(first), flatten(second)
    assert one.keys() == two.keys()
    for path in one:
        a, b = np.asarray(one[path]), np.asarray(two[path])
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_the_round_trip_is_exact(model, folder):
    loaded = sct.load(folder)
    equal(loaded.variables, model.variables)
    assert (loaded.config, loaded.family, loaded.license) == (CONFIG, "sct", "cc0-1.0")
    assert loaded.genes == model.genes
    assert "license: cc0-1.0" in loaded.card
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "genes.tsv",
        "README.md",
    }
    loaded.save_pretrained(folder.parent / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (folder.parent / "again" / file.name).read_bytes(), file.name


def test_the_weights_are_readable_with_safetensors_alone(model, folder):
    code = (
        "import json, sys; from safetensors.numpy import load_file; a = load_file(sys.argv[1]);"
        "assert not any(m.split('.')[0] in ('sct', 'jax', 'flax') for m in sys.modules);"
        "print(json.dumps({k: [v.shape, str(v.dtype), float(v.sum(dtype='f8'))] for k, v in a.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model.safetensors")],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    there = json.loads(done.stdout)
    flat = flatten(model.variables)
    assert there.keys() == flat.keys()
    for path, (shape, dtype, total) in there.items():
        assert (tuple(shape), dtype) == (flat[path].shape, "float32")
        np.testing.assert_allclose(total, np.asarray(flat[path], np.float64).sum(), rtol=1e-12)


def test_bfloat16_is_the_rounded_model(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype="bfloat16")
    loaded = sct.load(tmp_path / "half")
    equal(loaded.variables, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.variables))
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert size < 0.6 * 4 * sum(x.size for x in jax.tree.leaves(model.variables))
    wide = sct.load(tmp_path / "half", dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(wide.variables)} == {np.dtype("float32")}
    with pytest.raises(CheckpointError, match="dtype 'int8' is not one of"):
        model.save_pretrained(tmp_path / "bad", dtype="int8")


def test_large_models_are_split_over_files(model, tmp_path):
    model.save_pretrained(tmp_path / "split", shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(flatten(model.variables))
    equal(sct.load(tmp_path / "split").variables, model.variables)
    (tmp_path / "split" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"has no {files[1]}: the folder is incomplete"):
        sct.load(tmp_path / "split")


def test_loading_onto_a_mesh_places_each_array(model, folder):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loaded = sct.load(folder, mesh=mesh, rules=RULES)
    equal(loaded.variables, model.variables)
    assert all(leaf.sharding.mesh.shape == mesh.shape for leaf in jax.tree.leaves(loaded.variables))


def test_apply(model):
    tokens = np.random.default_rng(0).integers(0, 6, (2, 3, 64)).astype(np.uint8)
    outputs = model.apply(tokens=tokens, coordinates=None)
    assert set(outputs) == {"logits", "cell_embedding"}
    assert outputs["logits"].shape == (2, 3, 64, 7)
    assert outputs["cell_embedding"].shape == (2, 3, 32)
    full = SCT(CONFIG).apply(model.variables, tokens)
    np.testing.assert_allclose(outputs["logits"], full["logits"], atol=1e-5)
    more = model.apply(tokens=tokens, intermediates=("deconv_out", "conv_out"))
    assert set(more) == {"logits", "cell_embedding", "conv_out", "deconv_out"}
    np.testing.assert_allclose(more["conv_out"], full["conv_out"], atol=1e-5)
    with pytest.raises(CheckpointError, match="choose from conv_out, transformer_out, deconv_out"):
        model.apply(tokens=tokens, intermediates=("attention",))


def test_apply_compiles_once_for_each_shape(model):
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: compiled.append(name) if "backend_compile" in name else None
    )
    tokens = np.zeros((1, 5, 64), np.uint8)
    model.apply(tokens=tokens)
    count = len(compiled)
    assert count > 0
    model.apply(tokens=tokens + 1)
    dataclasses.replace(model, card="another handle").apply(tokens=tokens)
    assert len(compiled) == count
    model.apply(tokens=np.zeros((1, 6, 64), np.uint8))
    assert len(compiled) > count


def test_differences_are_listed(model, folder):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    arrays["params/extra"] = np.zeros(2, np.float32)
    arrays["params/stem/conv/bias"] = np.zeros(31, np.float32)
    del arrays["params/head/logits/bias"]
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="3 parameters differ") as error:
        sct.load(folder)
    for line in ("+ params/extra (2,)", "~ params/stem/conv/bias (31,) instead of (32,)",
                 "- params/head/logits/bias (7,)"):  # fmt: skip
        assert line in str(error.value)


def test_another_vocabulary_is_refused_with_both_named(model, folder):
    other = GeneVocabulary.from_ids(model.genes.ensembl_ids[::-1], name="backwards")
    with pytest.raises(StoreError) as error:
        sct.load(folder, genes=other)
    assert other.hash[:8] in str(error.value)
    assert model.genes.hash[:8] in str(error.value)
    assert sct.load(folder, genes=model.genes).genes.hash == model.genes.hash


def test_a_changed_gene_list_is_noticed(model, folder):
    GeneVocabulary.from_ids(model.genes.ensembl_ids[::-1]).save(folder / "genes.tsv")
    with pytest.raises(CheckpointError, match="the folder was changed"):
        sct.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"format_version": 99, "family": "sct"}', "upgrade sct"),
        ("model.safetensors", b"short", "is damaged"),
    ],
)
def test_damaged_folders(folder, file, content, message):
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        sct.load(folder)
    assert "\n" not in str(error.value)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        sct.load(folder)


def test_nothing_is_overwritten_that_is_no_model(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(CheckpointError, match="holds other files and no model"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


def test_a_failed_save_leaves_the_old_model(model, folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    changed = dataclasses.replace(model, variables=jax.tree.map(lambda x: x + 1, model.variables))
    with pytest.raises(OSError, match="No space"):
        changed.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    equal(sct.load(folder).variables, model.variables)


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="does not exist"):
        sct.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a model folder"):
        sct.load(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct\[hub\]"'):
        sct.load("someone/a-model")


def test_a_hub_id_is_fetched(model, folder, monkeypatch):
    import types

    asked = []
    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = lambda name: asked.append(name) or str(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    equal(sct.load("someone/a-model").variables, model.variables)
    assert asked == ["someone/a-model"]

    def offline(name):
        raise ConnectionError("no route to host\nlong explanation")

    fake.snapshot_download = offline
    with pytest.raises(CheckpointError, match=r"could not be fetched .*\(no route to host\)") as error:
        sct.load("someone/a-model")
    assert "\n" not in str(error.value)


def test_a_run_folder_gives_its_best_checkpoint(config, tmp_path, monkeypatch):
    # Where the largest loss counts as the best, the best step is an early one.
    monkeypatch.setattr(MaskedExpression, "monitor_mode", "max")
    plain = config(train__eval_every=5, train__patience=0)
    stopped = run({**plain, "train": {**plain["train"], "stop_at": 15}}, tmp_path)
    assert stopped.progress.best_step == 5
    assert not (tmp_path / "model").exists()
    early = sct.load(tmp_path)
    with pytest.raises(AssertionError):
        equal(early.variables, jax.device_get(stopped.state.variables))
    finished = run(plain, tmp_path)
    assert finished.progress.best_step == stopped.progress.best_step
    exported = sct.load(tmp_path)
    equal(early.variables, exported.variables)
    assert early.genes == exported.genes


def test_an_unfinished_run_can_be_continued_from_elsewhere(config, tmp_path):
    run(config(train__stop_at=5), tmp_path / "a")
    result = run(config(train__steps=1, init_from=str(tmp_path / "a")), tmp_path / "b")
    assert result.progress.step == 1


def test_flat_paths_and_back(model):
    equal(unflatten(flatten(model.variables)), model.variables)
