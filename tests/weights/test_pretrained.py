"""Model folders: exact round trips, strict loading, readable without this project."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from fnmatch import fnmatch
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sct
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.tokenizer import train_bpe
from sct.errors import CheckpointError, ConfigError, DataError, MissingExtraError, StoreError
from sct.hashes import SEAL
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.nn.paths import flatten, unflatten
from sct.tasks.masked_expression import MaskedExpression
from sct.train.experiment import run
from sct.train.sharding import RULES, MeshConfig, make_mesh
from sct.version import DISTRIBUTION
from sct.weights import model_folder, pretrained, run_folder
from sct.weights.load import load_tokenizer
from tests.train.conftest import CONFIG as CONFIG_OF_RUNS
from tests.train.conftest import merged
from tests.weights.conftest import unsealed

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
    chex.assert_trees_all_equal_dtypes(first, second)
    chex.assert_trees_all_equal(first, second, strict=True)


@pytest.mark.slow
def test_the_round_trip_is_exact(model, folder):
    loaded = sct.load(folder)
    equal(loaded.variables, model.variables)
    assert (loaded.config, loaded.family, loaded.license, loaded.step) == (CONFIG, "sct", "cc0-1.0", None)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_bfloat16_is_the_rounded_model(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype="bfloat16")
    loaded = sct.load(tmp_path / "half")
    equal(loaded.variables, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.variables))
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert size < 0.6 * 4 * sum(x.size for x in jax.tree.leaves(model.variables))
    # A model of fewer digits does not grow when it is saved again.
    loaded.save_pretrained(tmp_path / "again")
    equal(sct.load(tmp_path / "again").variables, loaded.variables)
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == pytest.approx(size, abs=1000)
    wide = sct.load(tmp_path / "half", dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(wide.variables)} == {np.dtype("float32")}
    with pytest.raises(CheckpointError, match="'int8'"):
        model.save_pretrained(tmp_path / "bad", dtype="int8")


@pytest.mark.slow
def test_float16_weights_compute_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype="float16")
    loaded = sct.load(tmp_path / "half")
    equal(
        loaded.variables, jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), model.variables)
    )
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert size < 0.6 * 4 * sum(x.size for x in jax.tree.leaves(model.variables))
    tokens = np.random.default_rng(0).integers(0, CONFIG.num_bins, (1, 3, 64))
    narrow = sct.load(tmp_path / "half", dtype="float16").apply(tokens=tokens)
    wide = loaded.apply(tokens=tokens)
    for name in wide:
        assert narrow[name].dtype == jnp.float32
        # Rounding to float16 anywhere would give differences of 1e-3.
        np.testing.assert_allclose(narrow[name], wide[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(wide["logits"], model.apply(tokens=tokens)["logits"], rtol=0.02, atol=0.02)


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
    for rules in (RULES, None):
        loaded = sct.load(folder, mesh=mesh, rules=rules)
        equal(loaded.variables, model.variables)
        assert all(leaf.sharding.mesh.shape == mesh.shape for leaf in jax.tree.leaves(loaded.variables))
    with pytest.raises(ConfigError, match="'rows'"):
        sct.load(folder, mesh=mesh, rules={"embed": ("rows",)})
    other = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])
    equal(sct.load(folder, mesh=other).variables, model.variables)


@pytest.mark.slow
def test_a_mesh_of_several_devices_in_parts(model, folder, config, tmp_path):
    run(config(train__stop_at=5), tmp_path / "run")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.mesh_load", str(folder), str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**environment, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for what in json.loads(done.stdout.splitlines()[-1]):
        assert what["devices"] == 8
        assert what["equal"]
        # Convolutions, which are nearly all of the model, go over 4 x 2 devices.
        assert what["bytes_per_device"] < 0.25 * what["bytes"]
        assert what["split"] > 5
        assert what["largest_read"] <= what["largest_part"]


def test_a_model_is_shown_in_a_line(model):
    assert len(repr(model)) < 100
    assert "60 genes" in repr(model)


@pytest.mark.slow
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
    with pytest.raises(CheckpointError, match="'conv_out', 'transformer_out', 'deconv_out'"):
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


@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_differences_are_listed(model, folder):
    from safetensors.numpy import load_file, save_file

    unsealed(folder)
    arrays = load_file(folder / "model.safetensors")
    arrays["params/extra"] = np.zeros(2, np.float32)
    arrays["params/stem/conv/bias"] = np.zeros(31, np.float32)
    del arrays["params/head/logits/bias"]
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="3 parameters") as error:
        sct.load(folder)
    for line in ("+ params/extra (2,)", "~ params/stem/conv/bias (31,) instead of (32,)",
                 "- params/head/logits/bias (7,)"):  # fmt: skip
        assert line in str(error.value)


@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_types_of_weights(model, folder):
    from safetensors.numpy import load_file, save_file

    unsealed(folder)
    arrays = load_file(folder / "model.safetensors")
    arrays["params/stem/conv/bias"] = np.zeros(32, np.int32)
    arrays["params/head/logits/bias"] = np.zeros(7, np.float64)
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="2 parameters") as error:
        sct.load(folder)
    assert "~ params/stem/conv/bias int32 instead of float32" in str(error.value)
    assert "~ params/head/logits/bias float64 instead of float32" in str(error.value)
    for dtype in ("int8", "float64", "nonsense"):
        with pytest.raises(CheckpointError, match="'float32', 'bfloat16', 'float16'"):
            sct.load(folder, dtype=dtype)


def test_more_genes_than_positions(model, tmp_path):
    many = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[:65])
    dataclasses.replace(model, genes=many).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="65 genes"):
        sct.load(tmp_path / "model")


TOKENS = np.zeros((2, 3, 64), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": TOKENS, "coords": TOKENS}, "'coords'"),
        ({}, "'tokens'"),
        ({"tokens": TOKENS[0]}, r"shape \(3, 64\)"),
        ({"tokens": TOKENS[:0]}, "non-empty"),
        ({"tokens": TOKENS.astype(np.float32)}, "float32"),
        ({"tokens": TOKENS[..., :60]}, r"\b60\b"),
        ({"tokens": TOKENS + 7}, r"tokens .*\b7\b"),
        ({"tokens": jnp.asarray(TOKENS) + 7}, "tokens has values from 7 to 7"),
        ({"tokens": TOKENS.astype(np.int32) - 1}, "tokens has values from -1 to -1"),
        ({"tokens": TOKENS.astype(np.int64) + 2**32}, "tokens has values from 4294967296"),
        ({"tokens": TOKENS, "coordinates": np.zeros((2, 3, 2))}, "spatial"),
        ({"tokens": TOKENS, "coordinates": np.zeros((2, 2))}, r"coordinates .*\(2, 2\)"),
        ({"tokens": TOKENS, "positions": np.array([[0], [192]])}, r"positions .*192"),
        ({"tokens": TOKENS, "positions": np.array([0, 1])}, "positions"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(model, inputs, message):
    with pytest.raises(DataError, match=message) as error:
        model.apply(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_apply_inside_of_a_compiled_function(model):
    traced = jax.jit(lambda tokens: model.apply(tokens=tokens)["logits"])(TOKENS)
    np.testing.assert_allclose(traced, model.apply(tokens=TOKENS.tolist())["logits"], atol=1e-5)


def test_another_vocabulary_is_refused_with_both_named(model, folder):
    other = GeneVocabulary.from_ids(model.genes.ensembl_ids[::-1], name="backwards")
    with pytest.raises(StoreError) as error:
        sct.load(folder, genes=other)
    assert other.hash[:8] in str(error.value)
    assert model.genes.hash[:8] in str(error.value)
    assert sct.load(folder, genes=model.genes).genes.hash == model.genes.hash


def test_a_changed_gene_list_is_noticed(model, folder):
    GeneVocabulary.from_ids(model.genes.ensembl_ids[::-1]).save(folder / "genes.tsv")
    with pytest.raises(CheckpointError, match=r"genes\.tsv is damaged or was changed"):
        sct.load(folder)
    unsealed(folder)
    with (
        pytest.raises(CheckpointError, match="changed"),
        pytest.warns(UserWarning, match="no hashes"),
    ):
        sct.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "JSON"),
        ("config.json", b'{"format_version": 99, "family": "sct"}', "--upgrade sct-jax"),
        ("config.json", b'{"format_version": 1, "family": ["sct"]}', "--upgrade sct-jax"),
        ("config.json", b"[]", "list"),
        ("config.json", b'{"format_version": 1, "family": "sct"}', "model = None"),
        ("config.json", b'{"format_version": 1, "family": "sct", "model": null}', "model = None"),
        (
            "config.json",
            b'{"format_version": 1, "family": "sct", "model": {}, "step": "x"}',
            "step",
        ),
        ("model.safetensors.index.json", b"[]", "is of type list"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}', "no valid weight_map"),
        ("model.safetensors", b"short", "is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_damaged_folders(folder, file, content, message):
    if "index" in file:
        unsealed(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        sct.load(folder)
    assert "\n" not in str(error.value)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        sct.load(folder)


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap_genes(path: Path) -> None:
    header, first, second, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([header, second, first, *rest]))


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def overwrite_weight(path: Path, value: float) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(path)
    arrays["params/head/logits/bias"][3] = value
    save_file(arrays, path)


ALTERED = {
    "a bit of the last weight": ("model.safetensors", lambda f: flip_bit(f / "model.safetensors", -1)),
    "zeros": ("model.safetensors", lambda f: overwrite_weight(f / "model.safetensors", 0.0)),
    "a letter of a gene": ("genes.tsv", lambda f: flip_bit(f / "genes.tsv", 200)),
    "genes swapped": ("genes.tsv", lambda f: swap_genes(f / "genes.tsv")),
    "another number of heads": ("config.json", lambda f: edit_config(f, lambda c: c["model"].update(num_heads=1))),
    "another eps": ("config.json", lambda f: edit_config(f, lambda c: c["model"].update(layer_norm_eps=0.1))),
    "no data section": ("config.json", lambda f: edit_config(f, lambda c: c.pop("data"))),
    "another step": ("config.json", lambda f: edit_config(f, lambda c: c.update(step=7))),
    "another hash": ("config.json", lambda f: edit_config(f, lambda c: c["files"].update({"genes.tsv": "0"}))),
    "no genes": ("genes.tsv", lambda f: (f / "genes.tsv").unlink()),
    "a file more": ("tokenizer.json", lambda f: (f / "tokenizer.json").write_text("{}")),
}  # fmt: skip


def test_every_byte_of_a_model_folder_is_checked(model, tmp_path):
    wrong = []
    for what, (file, alter) in ALTERED.items():
        folder = tmp_path / what.replace(" ", "-")
        model.save_pretrained(folder)
        alter(folder)
        try:
            sct.load(folder)
            wrong.append(f"{what}: loaded")
        except CheckpointError as error:
            if file not in str(error) or "\n" in str(error):
                wrong.append(f"{what}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_bit_of_one_of_several_files(model, tmp_path):
    model.save_pretrained(tmp_path / "split", shard_bytes=20_000)
    flip_bit(sorted((tmp_path / "split").glob("model-*"))[1], -1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors is damaged or was changed"):
        sct.load(tmp_path / "split")


def test_a_folder_whose_options_have_former_names_is_loaded(model, folder):
    new = {"stem_taps": "stem_kernel_size", "conv_taps": "conv_kernel_size"}

    def rename(config):
        config["model"].update({old: config["model"].pop(name) for old, name in new.items()})
        del config[SEAL]

    edit_config(folder, rename)
    with warnings.catch_warnings():  # nobody edits a saved model, so nothing asks for it
        warnings.simplefilter("error", FutureWarning)
        loaded = sct.load(folder)
    assert loaded.config == model.config
    edit_config(folder, lambda config: config["model"].update(stem_kernel_size=15))
    with pytest.raises(ConfigError, match="stem_taps and stem_kernel_size"):
        sct.load(folder)


def test_a_change_that_is_meant(model, folder, recwarn):
    # The layout of the file is free, and so is the card.
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    (folder / "README.md").write_text("my model")
    equal(sct.load(folder).variables, model.variables)
    assert not recwarn
    edit_config(folder, lambda config: config["model"].update(layer_norm_eps=1e-4))
    with pytest.raises(CheckpointError, match="delete the entry 'sha256' if"):
        sct.load(folder)
    edit_config(folder, lambda config: config.pop("sha256"))
    with pytest.warns(UserWarning, match="has no hashes of itself") as notes:
        loaded = sct.load(folder)
    assert len(notes) == 1
    assert loaded.config.layer_norm_eps == 1e-4
    flip_bit(folder / "model.safetensors", -1)  # the weights are still checked
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors"),
        pytest.warns(UserWarning, match="no hashes"),
    ):
        sct.load(folder)


def test_folders_without_hashes_are_loaded_with_a_note(model, folder, tmp_path):
    unsealed(folder)
    with pytest.warns(UserWarning, match="no hashes of the files") as notes:
        loaded = sct.load(folder)
    assert len(notes) == 1
    equal(loaded.variables, model.variables)
    loaded.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sct.load(tmp_path / "again")


@pytest.mark.filterwarnings("ignore:.*no hashes")
@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_weights_that_are_not_finite(model, tmp_path):
    from safetensors.flax import save_file

    name, mesh = "params/head/logits/bias", make_mesh(MeshConfig(data=1), jax.devices()[:1])
    for dtype, value, where in (
        ("float32", np.nan, None),
        ("float32", np.inf, mesh),
        ("bfloat16", -np.inf, None),
    ):
        folder, flat = tmp_path / f"{dtype}{value}", dict(flatten(model.variables))
        model.save_pretrained(folder, dtype=dtype)
        flat = {path: leaf.astype(dtype) for path, leaf in flat.items()}
        flat[name] = flat[name].at[3].set(value)
        bad = dataclasses.replace(model, variables=unflatten(flat))
        with pytest.raises(CheckpointError, match=f"{name} has NaN or infinite values"):
            bad.save_pretrained(tmp_path / "bad", dtype=dtype)
        assert not (tmp_path / "bad").exists()
        save_file(flat, unsealed(folder) / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"NaN or infinite values in {name}") as error:
            sct.load(folder, mesh=where)
        assert "\n" not in str(error.value)


def test_weights_that_float16_cannot_hold(model, tmp_path):
    flat = dict(flatten(model.variables))
    flat["params/head/logits/bias"] = flat["params/head/logits/bias"].at[3].set(1e6)
    dataclasses.replace(model, variables=unflatten(flat)).save_pretrained(tmp_path / "large")
    sct.load(tmp_path / "large", dtype="bfloat16")
    with pytest.raises(
        CheckpointError, match="params/head/logits/bias has values that are too large for float16"
    ):
        sct.load(tmp_path / "large", dtype="float16")
    large = sct.load(tmp_path / "large")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"logits/bias has values .* float16: save the model"):
            large.save_pretrained(tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("there", "also"),
    [
        ({"thesis.txt": "irreplaceable"}, False),
        # A run folder, and foreign weights: both have a config.json of their own.
        ({"config.json": '{"family": "sct"}', "checkpoints/5/state": "x"}, False),
        ({"config.json": '{"alphabet_size": 7}', "params.joblib": "x"}, False),
        ({"config.json": '{"format_version": 1}'}, False),
        ({"config.json": "[]"}, False),
        # A model folder with something beside the model.
        ({"notes.md": "x"}, True),
        ({"checkpoints/5": "x"}, True),
        ({"adapter.safetensors": "x"}, True),
    ],
)
def test_nothing_is_overwritten_that_is_no_model(model, tmp_path, there, also):
    target = tmp_path / "target"
    if also:
        model.save_pretrained(target)
    for name, text in there.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="do not belong") as error:
        model.save_pretrained(target)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_what_lies_beside_the_folder_is_not_overwritten(model, tmp_path):
    for name in (".target.tmp", ".target.0123.tmp", ".target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("irreplaceable")
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="other files"):
        model.save_pretrained(tmp_path / "target")
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / ".target.old")
    model.save_pretrained(tmp_path / "target")
    assert {name: text for name, text in files(tmp_path).items() if name.startswith(".")} == {
        name: text for name, text in before.items() if ".old" not in name
    }


def test_a_killed_save_leaves_nothing_that_the_next_one_does_not_remove(model, tmp_path):
    left = tmp_path / ".target.0123456789abcdef.tmp"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    model.save_pretrained(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_places_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written") as error:
        model.save_pretrained(tmp_path / "file" / "below")
    assert "\n" not in str(error.value)
    assert files(tmp_path) == {"file": b"kept"}


def test_a_link_to_a_folder_stays_a_link(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        model.save_pretrained(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
    equal(sct.load(tmp_path / "disk").variables, model.variables)


def killed_while_replacing(model, folder):
    """Save in a process that dies between the two renames."""
    changed = dataclasses.replace(model, variables=jax.tree.map(lambda x: x + 1, model.variables))
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def rename(source, target):
        calls.append(Path(target).name)
        replace(source, target)
        if Path(target).name == f".{folder.name}.old":
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", rename)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            changed.save_pretrained(folder)
    assert not folder.exists()
    return changed


def test_a_process_killed_while_it_replaces_a_model_loses_nothing(model, folder):
    changed = killed_while_replacing(model, folder)
    equal(sct.load(folder).variables, model.variables)
    # A save that fails afterwards puts the old model back; one that succeeds leaves nothing beside it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "_write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(CheckpointError, match="No space"):
            changed.save_pretrained(folder)
    equal(sct.load(folder).variables, model.variables)
    changed.save_pretrained(folder)
    equal(sct.load(folder).variables, changed.variables)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_rename_that_fails_puts_the_old_model_back(model, folder, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if Path(source).name.endswith(".tmp") and Path(target) == folder:
            raise OSError(5, "Input/output error")
        replace(source, target)

    before = files(folder.parent)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        model.save_pretrained(folder)
    assert files(folder.parent) == before


def test_a_failed_save_leaves_the_old_model(model, folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    changed = dataclasses.replace(model, variables=jax.tree.map(lambda x: x + 1, model.variables))
    with pytest.raises(CheckpointError, match="No space left"):
        changed.save_pretrained(folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_bytes() == before
    equal(sct.load(folder).variables, model.variables)


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="does not exist"):
        sct.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="model folder"):
        sct.load(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct-jax\[hub\]"'):
        sct.load("someone/a-model")


def test_a_path_that_leads_elsewhere_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names: list[str | Path] = [
        "../model", "./model", "someone/.model", "a/../b", "/someone/model", "someone/", "~/model", "runs/x",
        "models/x", "here/x", "runs/x/model", Path("someone/model"),
    ]  # fmt: skip
    for name in names:
        with pytest.raises(CheckpointError, match="does not exist") as error:
            sct.load(name)
        assert str(Path(name).expanduser()) in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            load_tokenizer(name)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer("someone/tokenizer.json")
    for load in (sct.load, load_tokenizer):
        with pytest.raises(MissingExtraError, match="hub"):
            load("someone/model")


def test_the_tokenizer_of_whatever_names_a_model(tmp_path, monkeypatch):
    tokenizer = train_bpe(["the cell of a liver"] * 3, 300)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    tokenizer.save(tmp_path / "model")
    fake = types.ModuleType("huggingface_hub")
    asked = []

    def fetch(name, *, allow_patterns, **options):
        asked.extend(allow_patterns)
        return str(tmp_path / "model")

    fake.snapshot_download = fetch
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for name in (
        tmp_path / "run",
        str(tmp_path / "model"),
        tmp_path / "model" / "tokenizer.json",
        "someone/model",
    ):
        assert load_tokenizer(name).fingerprint == tokenizer.fingerprint
    fetched = lambda name: any(fnmatch(name, pattern) for pattern in asked)  # noqa: E731
    needed = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "config.json",
    )
    assert all(fetched(name) for name in (*needed, "added_tokens.json", "generation_config.json"))
    assert fetched("tokenizer/tokenizer.json"), "of a run"
    weights = ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "genes.tsv")
    assert not any(fetched(name) for name in weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_shards_of_an_index_lie_in_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model", shard_bytes=20_000)
    unsealed(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in (
        "../x.safetensors",
        "/x.safetensors",
        "",
        "..",
        "a/b.safetensors",
        "a\\b.safetensors",
        3,
        None,
    ):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], "a": name}}))
        with pytest.raises(CheckpointError, match="no valid weight_map"):
            sct.load(tmp_path / "model")


def test_the_card_says_what_to_install_and_where_it_is_from_once_there_is_an_address(model, monkeypatch):
    assert f"`pip install {DISTRIBUTION}`, then" in pretrained.default_card(model)
    monkeypatch.setattr(pretrained, "REPOSITORY", "https://host.example/lab/project")
    card = pretrained.default_card(model)
    assert f"`pip install {DISTRIBUTION}` (https://host.example/lab/project), then" in card


def test_a_hub_id_is_fetched(model, folder, monkeypatch):
    asked = []
    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = lambda name, **options: asked.append(name) or str(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    equal(sct.load("someone/a-model").variables, model.variables)
    assert asked == ["someone/a-model"]

    def offline(name, **options):
        raise ConnectionError("no route to host\nlong explanation")

    fake.snapshot_download = offline
    with pytest.raises(CheckpointError, match="no route to host") as error:
        sct.load("someone/a-model")
    assert "\n" not in str(error.value)


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def finished_run(store, tmp_path_factory):
    """A run of 15 steps whose last checkpoint counts as the best, and its model of step 5."""
    folder = tmp_path_factory.mktemp("run") / "run"
    changes = {"data__store": str(store), "train__stop_at": 15, "train__eval_every": 5, "train__patience": 0}
    run(merged(CONFIG_OF_RUNS, **changes), folder)
    return folder


@pytest.fixture
def a_run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def set_best(folder, step):
    path = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name)) / "progress" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best_step": step}))
    run_folder.record_checkpoint(path.parent.parent)


@pytest.mark.slow
def test_an_export_from_before_the_run_went_on_is_not_taken(model, a_run):
    assert {p.name for p in (a_run / "checkpoints").iterdir()} >= {"10", "15"}
    for best, step in ((15, 15), (10, 10), (None, 15)):
        set_best(a_run, best)
        shutil.rmtree(a_run / "model", ignore_errors=True)
        early = sct.load(a_run)
        assert early.step == step
        assert f"step {step}" in early.card
        assert "## License" in early.card
        # An export of that step is preferred; here it is recognised by its values.
        marked = jax.tree.map(lambda x: x + 1, early.variables)
        dataclasses.replace(early, variables=marked).save_pretrained(a_run / "model")
        equal(sct.load(a_run).variables, marked)
        for stale in (step - 5, None):
            dataclasses.replace(early, variables=marked, step=stale).save_pretrained(a_run / "model")
            equal(sct.load(a_run).variables, early.variables)
    shutil.rmtree(a_run / "checkpoints")
    equal(sct.load(a_run).variables, marked)


@pytest.mark.slow
def test_any_checkpoint_of_a_run_is_loaded_by_its_step(a_run):
    best = sct.load(a_run)
    early, late = sct.load(a_run, step=10), sct.load(a_run, step=15)
    assert (early.step, late.step) == (10, 15)
    assert "step 10" in early.card
    equal((late if best.step == 15 else early).variables, best.variables)
    checkpoints = ocp.CheckpointManager(a_run.absolute() / "checkpoints", item_names=("state", "progress"))
    for model in (early, late):
        state = checkpoints.restore(model.step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))[
            "state"
        ]
        equal(
            flatten(model.variables),
            jax.tree.map(np.asarray, {**state["trained"], **(state["frozen"] or {})}),
        )
    checkpoints.close()
    early.save_pretrained(a_run / "model")
    equal(sct.load(a_run, step=15).variables, late.variables)
    for path, step, words in (
        (a_run, 12, "step 12: .*10, 15"),
        (a_run, 1.5, "step is 1.5"),
        (a_run / "model", 10, "not a run folder"),
        ("someone/a-model", 10, "not a run folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            sct.load(path, step=step)


@pytest.mark.slow
def test_a_best_checkpoint_that_is_gone_is_said(a_run):
    set_best(a_run, 3)
    with pytest.raises(CheckpointError, match=r"best step .* is 3, but only the checkpoints .*15 are left"):
        sct.load(a_run)


@pytest.mark.slow
def test_a_run_is_loaded_without_the_optimiser(a_run, monkeypatch):
    whole = sct.load(a_run)
    handler = ocp.PyTreeCheckpointHandler
    restore, seen = handler.restore, []

    def watched(self, *args, **kwargs):
        seen.append(restore(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(handler, "restore", watched)
    half = sct.load(a_run, dtype="bfloat16")
    assert [set(tree) for tree in seen] == [{"trained"}]
    equal(half.variables, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.variables))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "progress"])
def test_damaged_runs(a_run, file):
    path = a_run / "config.json" if file == "config.json" else a_run / "checkpoints/15/progress/metadata"
    for text in ("[]", "{", '{"family": 3, "best_step": "x"}'):
        path.write_text(text)
        with pytest.raises(CheckpointError) as error:
            sct.load(a_run)
        assert "\n" not in str(error.value)


def flip_a_bit_of_a_number(folder):
    """Change the middle of the largest file with arrays."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file() and path.parent.name == "d"]
    largest = max(files, key=lambda path: path.stat().st_size)
    flip_bit(largest, largest.stat().st_size // 2)


def lose_a_file(folder):
    next(
        path for path in (folder / "state").rglob("*") if path.is_file() and path.parent.name == "d"
    ).unlink()


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Of the run, or of its checkpoints of the steps 10 (the best) and 15 (the last).
ALTERED_RUNS = {
    "a bit of an array": ("10/state", lambda f: flip_a_bit_of_a_number(f / "checkpoints/10")),
    "a lost file": ("10/state", lambda f: lose_a_file(f / "checkpoints/10")),
    "another best step": (
        "15/progress", lambda f: edit_json(f / "checkpoints/15/progress/metadata", lambda c: c.update(best_step=15)),
    ),
    "no hash": ("10/sha256.json", lambda f: edit_json(f / "checkpoints/10/sha256.json", lambda c: c.update(files={}))),
    "genes swapped": ("genes.tsv", lambda f: swap_genes(f / "genes.tsv")),
    "no genes": ("genes.tsv", lambda f: (f / "genes.tsv").unlink()),
    "another eps": (
        "config.json", lambda f: edit_json(f / "config.json", lambda c: c["resolved_model"].update(layer_norm_eps=0.1)),
    ),
    "other data": ("config.json", lambda f: edit_json(f / "config.json", lambda c: c["data"].update(cells_per_bag=9))),
    "another license": ("data.json", lambda f: edit_json(f / "data.json", lambda c: c.update(license="mit"))),
    "other genes": ("data.json", lambda f: edit_json(f / "data.json", lambda c: c.update(vocabulary_hash="0"))),
}  # fmt: skip


@pytest.mark.slow
def test_every_byte_of_a_run_folder_is_checked(finished_run, config, store, tmp_path):
    """By `sct.load`, by a run that starts from it, and by the run that goes on."""
    wrong, resume = [], {"data__store": str(store), "train__eval_every": 5, "train__patience": 0}
    uses = {
        "load": lambda folder: sct.load(folder),
        "init_from": lambda folder: run(config(init_from=str(folder)), tmp_path / "new"),
        "resume": lambda folder: run(merged(CONFIG_OF_RUNS, **resume), folder),
    }
    set_best(finished_run, 10)
    for number, (what, (file, alter)) in enumerate(ALTERED_RUNS.items()):
        for use, function in uses.items():
            if (use == "init_from" and number) or (use == "resume" and file.startswith("1")):
                continue  # a run goes on from the last checkpoint: see below
            folder = tmp_path / f"{number}{use}"
            shutil.copytree(finished_run, folder)
            alter(folder)
            try:
                function(folder)
                wrong.append(f"{use} with {what}: not refused")
            except CheckpointError as error:
                if file not in str(error) or "\n" in str(error):
                    wrong.append(f"{use} with {what}: {error}")
            shutil.rmtree(folder)
    for alter in (flip_a_bit_of_a_number, lose_a_file):
        folder = tmp_path / f"last{alter.__name__}"
        shutil.copytree(finished_run, folder)
        alter(folder / "checkpoints/15")
        try:
            uses["resume"](folder)
            wrong.append(f"resume with {alter.__name__}: not refused")
        except CheckpointError as error:
            if "15/state" not in str(error) or "delete the checkpoint folder" not in str(error):
                wrong.append(f"resume with {alter.__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def old_run(folder):
    """Make a run folder what version 0.1.0 wrote at first: without hashes."""
    for path in (folder / "checkpoints").glob("*/sha256.json"):
        path.unlink()
    for name in ("config.json", "data.json"):
        edit_json(folder / name, lambda content: (content.pop("sha256"), content.pop("hashes", None)))
    return folder


@pytest.mark.slow
def test_runs_without_hashes_are_loaded_and_go_on_with_a_note(a_run, store):
    set_best(a_run, 10)
    expected = sct.load(a_run)
    with pytest.warns(UserWarning, match="no hashes") as notes:
        equal(sct.load(old_run(a_run)).variables, expected.variables)
    assert len(notes) == 2  # of the run, and of its checkpoint
    changes = {"data__store": str(store), "train__eval_every": 5, "train__patience": 0, "train__stop_at": 16}
    with pytest.warns(UserWarning, match="no hashes"):
        assert run(merged(CONFIG_OF_RUNS, **changes), a_run).progress.step == 16
    assert json.loads((a_run / "config.json").read_text())["sha256"]
    assert (a_run / "checkpoints/16/sha256.json").is_file()
    swap_genes(a_run / "genes.tsv")
    with (
        pytest.raises(CheckpointError, match=r"genes\.tsv has hash"),
        pytest.warns(UserWarning, match="no hashes"),
    ):
        sct.load(a_run)


@pytest.mark.slow
def test_a_checkpoint_whose_weights_are_not_finite(a_run):
    best = sct.load(a_run)
    with ocp.PyTreeCheckpointer() as writer:
        path = a_run / "checkpoints" / str(best.step) / "state"
        state = writer.restore(path)
        bias = state["trained"]["params/head/logits/bias"]
        state["trained"]["params/head/logits/bias"] = bias.at[3].set(np.nan)
        writer.save(path, state, force=True)
    run_folder.record_checkpoint(path.parent)
    with pytest.raises(CheckpointError, match="NaN or infinite values in params/head/logits/bias"):
        sct.load(a_run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_a_damaged_checkpoint(a_run):
    set_best(a_run, 15)
    for path in (a_run / "checkpoints" / "15" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"x")
    for message in ("15/state/.* is damaged or was changed", "cannot be read"):
        with pytest.raises(CheckpointError, match=message) as error:
            sct.load(a_run)
        assert "\n" not in str(error.value)
        (a_run / "checkpoints/15/sha256.json").unlink(missing_ok=True)


@pytest.mark.slow
def test_an_unfinished_run_can_be_continued_from_elsewhere(config, tmp_path):
    run(config(train__stop_at=5), tmp_path / "a")
    result = run(config(train__steps=1, init_from=str(tmp_path / "a")), tmp_path / "b")
    assert result.progress.step == 1


def test_flat_paths_and_back(model):
    equal(unflatten(flatten(model.variables)), model.variables)
