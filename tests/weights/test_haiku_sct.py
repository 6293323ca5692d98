"""The published implementation's numbers, stage by stage, and the safety of its file format."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pytest
from jax import lax

import sct
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError
from sct.models.sct import SCT
from sct.weights import haiku_sct

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
NAMES = ("sct_single_cell", "sct_spatial")
TOLERANCE = 1e-4  # absolute; what the published numbers are good for in float32


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    folder = GOLDENS / request.param
    model = haiku_sct.convert(folder, numbered_genes=True)
    arrays = dict(np.load(folder / "io.npz"))
    cells = arrays["tokens"].shape[1] // model.config.num_genes
    arrays["tokens"] = arrays["tokens"].reshape(2, cells, model.config.num_genes)
    params = haiku_sct.read_params(folder / "params.joblib")
    return model, arrays, {key.partition("/")[2]: leaves for key, leaves in params.items()}


def inputs(arrays):
    return {name: arrays[name] for name in ("tokens", "coordinates") if name in arrays}


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours).reshape(theirs.shape), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_conv_out(golden):
    model, arrays, _ = golden
    close(model.apply(intermediates=("conv_out",), **inputs(arrays))["conv_out"], arrays["conv_out"])


@pytest.mark.slow
def test_transformer_from_the_published_conv_out(golden):
    model, arrays, _ = golden

    def transform(module, x):
        for block in module.transformer:
            x = block(x)
        return x

    ours = SCT(model.config).apply(model.variables, jnp.asarray(arrays["conv_out"]), method=transform)
    close(ours, arrays["transformer_out"])


@pytest.mark.slow
def test_transformer_out(golden):
    model, arrays, _ = golden
    outputs = model.apply(intermediates=("transformer_out",), **inputs(arrays))
    close(outputs["transformer_out"], arrays["transformer_out"])


@pytest.mark.slow
def test_deconvolution_and_head_from_the_published_transformer_out(golden):
    model, arrays, _ = golden

    def finish(module, tokens, coordinates, x):
        _, skips = module.encode(module.embed(tokens, coordinates))
        return module.head(module.decode(x, skips))

    coordinates = arrays.get("coordinates")
    middle = jnp.asarray(arrays["transformer_out"])
    ours = SCT(model.config).apply(model.variables, arrays["tokens"], coordinates, middle, method=finish)
    close(ours, arrays["logits"])


@pytest.mark.slow
def test_logits(golden):
    model, arrays, _ = golden
    close(model.apply(**inputs(arrays))["logits"], arrays["logits"])


@pytest.mark.slow
def test_the_model_that_trains_gives_the_same_numbers(golden):
    # Recomputation in the backward pass and the head at chosen positions are what training adds.
    import dataclasses

    model, arrays, _ = golden
    config = dataclasses.replace(model.config, remat="level")
    coordinates = arrays.get("coordinates")
    positions = jnp.tile(jnp.arange(5, 700, 7), (2, 1))
    ours = SCT(config).apply(model.variables, arrays["tokens"], coordinates, positions)["logits"]
    close(ours, np.take_along_axis(arrays["logits"], np.asarray(positions)[..., None], axis=1))


# The rungs below the first published activation, each against its formula and the foreign parameters.


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def shared_norm(x, leaves, genes):
    y = x.reshape(x.shape[0], -1, genes, x.shape[-1]).astype(np.float64)
    y = (y - y.mean(2, keepdims=True)) / np.sqrt(y.var(2, keepdims=True) + 1e-5)
    return (y * leaves["scale"][:, None] + leaves["offset"][:, None]).reshape(x.shape)


def convolve(x, leaves):
    taps = leaves["w"].shape[0]
    wide = np.pad(x, ((0, 0), ((taps - 1) // 2, taps // 2), (0, 0)))
    windows = np.stack([wide[:, i : i + x.shape[1]] for i in range(taps)], axis=2)
    return np.einsum("blkc,kcf->blf", windows, leaves["w"]) + leaves["b"][:, 0]


def embedded(arrays, params):
    x = params["~/embed"]["embeddings"][arrays["tokens"]].astype(np.float64)
    if "coordinates" in arrays:
        steps = np.linspace(1.0, 10.0, 10)
        sigma = 1.0 * 10.0 ** (steps / 9)
        angle = arrays["coordinates"][..., None, :] / sigma[:, None]
        features = np.stack([np.cos(angle[..., 0]), np.sin(angle[..., 1])], -1).reshape(*angle.shape[:2], 20)
        layer = params["spatial_encoding/~/spatial_fully_connected"]
        x = x + (features @ layer["w"] + layer["b"])[:, :, None]
    return x.reshape(2, -1, 32)


def run(model, method, *args):
    return np.asarray(SCT(model.config).apply(model.variables, *args, method=method))


def test_embedding(golden):
    model, arrays, params = golden
    close(run(model, "embed", arrays["tokens"], arrays.get("coordinates")), embedded(arrays, params))


def test_stem(golden):
    model, arrays, params = golden
    x = embedded(arrays, params)
    ours = run(model, lambda module, x: module.stem(x), x.astype(np.float32))
    close(ours, gelu(convolve(x, params["stem/conv1_d"])))


def test_one_level_of_the_tower(golden):
    model, arrays, params = golden
    x = gelu(convolve(embedded(arrays, params), params["stem/conv1_d"]))
    ours = run(model, lambda module, x: module.down[0](x), x.astype(np.float32))
    block, residual = "conv_block_0/conv_block", "conv_block_0/residual_conv_block/conv_block"
    x = gelu(convolve(shared_norm(x, params[f"{block}/layer_norm"], 256), params[f"{block}/conv1_d"]))
    x = x + gelu(
        convolve(shared_norm(x, params[f"{residual}/layer_norm"], 256), params[f"{residual}/conv1_d"])
    )
    close(ours, x.reshape(2, -1, 2, x.shape[-1]).mean(axis=2))


def test_one_level_of_the_deconvolution(golden):
    model, arrays, params = golden
    x = arrays["transformer_out"]
    ours = run(model, lambda module, x: module.up[0](x), x)
    block, residual = "deconv_block_0/de_conv_block", "deconv_block_0/residual_de_conv_block/de_conv_block"
    leaves = params[f"{block}/conv1_d_transpose"]
    y = lax.conv_transpose(
        jnp.asarray(shared_norm(x, params[f"{block}/layer_norm"], 16), jnp.float32),
        leaves["w"].transpose(0, 2, 1), (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip
    y = gelu(np.asarray(y) + leaves["b"][:, 0])
    leaves = params[f"{residual}/conv1_d_transpose"]
    z = shared_norm(y, params[f"{residual}/layer_norm"], 32) @ leaves["w"][0].T + leaves["b"][:, 0]
    close(ours, y + gelu(z))


def test_the_head(golden):
    model, _, params = golden
    x = np.random.default_rng(0).normal(size=(2, 10, 32)).astype(np.float32)
    ours = run(model, lambda module, x: module.head(x), x)
    y = gelu(gelu(x) @ params["linear"]["w"] + params["linear"]["b"])
    close(ours, y @ params["linear_1"]["w"] + params["linear_1"]["b"])


# The file format.


def test_malicious_pickle_does_nothing(tmp_path):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for name, write in (
        ("plain", lambda path, value: path.write_bytes(pickle.dumps(value))),
        ("zlib", lambda path, value: path.write_bytes(zlib.compress(pickle.dumps(value)))),
        ("joblib", lambda path, value: joblib.dump(value, path, compress=True)),
    ):
        path = tmp_path / f"{name}.joblib"
        write(path, {"model/~/embed": {"embeddings": Attack()}})
        with pytest.raises(CheckpointError, match=r"would load (posix|nt)\.system"):
            haiku_sct.read_params(path)
    # An array of objects would be read through a second pickle inside of the file.
    path = tmp_path / "objects.joblib"
    joblib.dump({"a": {"w": np.array([Attack()], dtype=object)}}, path)
    with pytest.raises(CheckpointError, match=r"needs (posix|nt)|Python objects"):
        haiku_sct.read_params(path)
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.joblib").read_bytes())
    assert marker.exists(), "the attack itself must be a real one"


def test_an_array_of_plain_objects_is_refused(tmp_path):
    path = tmp_path / "objects.joblib"
    joblib.dump({"a": {"w": np.array([1, None], dtype=object)}}, path)
    with pytest.raises(CheckpointError, match="Python objects"):
        haiku_sct.read_params(path)


@pytest.mark.parametrize("damage", [b"", b"not a pickle", b"\x78\x9c broken"])
def test_damaged_files_are_a_sentence(tmp_path, damage):
    path = tmp_path / "params.joblib"
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match="joblib"):
        haiku_sct.read_params(path)


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3)])
def test_every_compression_gives_the_same_arrays(tmp_path, compress):
    params = haiku_sct.read_params(GOLDENS / "sct_single_cell" / "params.joblib")
    joblib.dump(params, tmp_path / "params.joblib", compress=compress)
    again = haiku_sct.read_params(tmp_path / "params.joblib")
    assert params.keys() == again.keys()
    for key, leaves in params.items():
        for leaf, value in leaves.items():
            np.testing.assert_array_equal(value, again[key][leaf])


@pytest.fixture
def folder(tmp_path):
    """A copy of a published model that a test may damage."""
    shutil.copytree(GOLDENS / "sct_single_cell", tmp_path / "weights")
    return tmp_path / "weights"


def rewrite(folder, change):
    params = haiku_sct.read_params(folder / "params.joblib")
    change(params)
    joblib.dump(params, folder / "params.joblib")


def test_differences_are_listed(folder):
    def change(params):
        del params["long_range_nt/stem/conv1_d"]["b"]
        params["long_range_nt/linear"]["w"] = np.zeros((32, 65), np.float32)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        haiku_sct.convert(folder, numbered_genes=True)
    assert "- params/stem/conv/bias (32,)" in str(error.value)
    assert "~ params/head/hidden_0/kernel (32, 65) instead of (32, 64)" in str(error.value)


def test_strange_keys_are_listed(folder):
    rewrite(folder, lambda params: params.update({"long_range_nt/extra": {"w": np.zeros(3)}}))
    with pytest.raises(CheckpointError, match=r"long_range_nt/extra w \(3,\)"):
        haiku_sct.convert(folder, numbered_genes=True)


def test_the_name_of_the_model_may_be_anything(folder):
    before = haiku_sct.convert(folder, numbered_genes=True)
    params = haiku_sct.read_params(folder / "params.joblib")
    joblib.dump({f"other/{key.partition('/')[2]}": v for key, v in params.items()}, folder / "params.joblib")
    after = haiku_sct.convert(folder, numbered_genes=True)
    chex.assert_trees_all_equal(before.variables, after.variables, strict=True)


@pytest.mark.parametrize("field", ["attention_heads", "key_size"])
def test_a_configuration_that_contradicts_the_weights(folder, field):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[field] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="key_size"):
        haiku_sct.convert(folder, numbered_genes=True)


NAME = "long_range_nt"


def put(key, leaf, value):
    """Change that sets one parameter to a value, or to a function of it."""

    def change(params):
        leaves = params.setdefault(f"{NAME}/{key}", {})
        leaves[leaf] = value(leaves[leaf]) if callable(value) else value

    return change


def renamed(params):
    key = f"{NAME}/linear"
    params["another/linear"] = params.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("linear_0", "w", np.zeros((32, 64), np.float32)), r"duplicate: .*/linear w, .*/linear_0 w"),
        (renamed, "another, long_range_nt"),
        (put("linear", "w", lambda w: w + np.float32("nan")), r"linear w .*finite"),
        (put("stem/conv1_d", "b", lambda b: b[:, 0]), r"stem/conv1_d b \(32,\)"),
        (put("stem/conv1_d", "b", lambda b: np.tile(b, 2)), r"b \(32, 2\)"),
        (put("stem/conv1_d", "w", lambda w: w[0]), r"w \(32, 32\)"),
        (put("deconv_block_0/de_conv_block/conv1_d_transpose", "w", lambda w: w[0]), "2 axes"),
        (put("linear", "b", np.array(["a"] * 64)), r"linear b .*<U1"),
        (put("linear", "b", np.zeros(64, np.int32)), r"linear b .*int32"),
        (put("~/embed", "embeddings", np.array(1.0, np.float32)), "0 axes"),
        (put("attention_layer_0/~/fc1", "w", lambda w: w[:, 1:]), "params/transformer_0/mlp/gate/kernel"),
        (
            lambda params: params.pop(f"{NAME}/conv_block_0/conv_block/layer_norm"),
            "conv_block_0/conv_block/layer_norm scale",
        ),
        (lambda params: params.pop(f"{NAME}/stem/conv1_d"), "stem/conv1_d w"),
    ],
)
def test_parameters_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        haiku_sct.convert(folder, numbered_genes=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_scales", None, "num_scales"),
        ("embed_dim", "x", "embed_dim"),
        ("embed_dim", 64.5, "embed_dim"),
        ("num_hidden_layers_head", None, "num_hidden_layers_head"),
        ("use_skip_connection", "false", "use_skip_connection"),
        ("sigma_min", [1.0], "sigma_min"),
        ("attention_heads", 0, "num_heads"),
        ("alphabet_size", None, "alphabet_size"),
    ],
)
def test_options_that_do_not_fit(folder, field, value, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message) as error:
        haiku_sct.convert(folder, numbered_genes=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", "{", "{}"])
def test_damaged_configurations(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        haiku_sct.convert(folder, numbered_genes=True)


def test_a_whole_number_is_good_enough_for_a_real_one(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sigma_min": 1, "sigma_max": 10}))
    assert haiku_sct.convert(folder, numbered_genes=True).config.sigma_max == 10.0


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{}", "[]", '{"1": -1}', '{"1": null}'])
def test_damaged_vocabularies(folder, text):
    for damaged in ("ensembl_id_vocab.json", "protein_gene_map.json"):
        vocabulary_files(folder)
        (folder / damaged).write_text(text)
        with pytest.raises(CheckpointError, match=r"vocabulary files|positions") as error:
            haiku_sct.convert(folder)
        assert "\n" not in str(error.value)


def test_genes_are_not_ignored_where_the_folder_has_its_own(folder):
    vocabulary_files(folder)
    genes = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[:250])
    for given in ((genes, False), (None, True)):
        with pytest.raises(CheckpointError, match="--genes"):
            haiku_sct.convert(folder, *given)


def vocabulary_files(folder, positions=254):
    """Files of the published form: two coding genes have no Ensembl id, other genes are interleaved."""
    human = GeneVocabulary.human().ensembl_ids
    order = np.random.default_rng(0).permutation(positions)
    coding = {str(3 * i + 1): int(position) for i, position in enumerate(order)}
    named = {human[100 + int(p)]: 3 * i + 1 for i, p in enumerate(order) if p not in (7, 9)}
    others = {human[1000 + i]: 3 * i for i in range(positions)}
    (folder / "ensembl_id_vocab.json").write_text(json.dumps({**named, **others}))
    (folder / "protein_gene_map.json").write_text(json.dumps(coding))
    return ["" if p in (7, 9) else human[100 + p] for p in range(positions)]


def test_the_vocabulary_files_give_the_order(folder):
    ids = vocabulary_files(folder)
    model = haiku_sct.convert(folder)
    assert list(model.genes.ensembl_ids) == ids
    assert model.genes.symbols[7] == "position_7"
    assert model.config.num_genes == 256


def test_vocabulary_files_must_fit(folder):
    vocabulary_files(folder, 300)
    with pytest.raises(CheckpointError, match="positions 0 to 255"):
        haiku_sct.convert(folder)
    (folder / "protein_gene_map.json").unlink()
    with pytest.raises(CheckpointError, match=r"protein_gene_map\.json"):
        haiku_sct.convert(folder)


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "launch.convert", "--from=haiku-sct", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    (folder / "jax_params").mkdir()
    (folder / "params.joblib").rename(folder / "jax_params" / "params.joblib")
    output = tmp_path / "model"
    refused = command(f"--input={folder}", f"--output={output}")
    assert refused.returncode == 1
    assert "--genes=none" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not output.exists()
    done = command(f"--input={folder}", f"--output={output}", "--genes=none")
    assert done.returncode == 0, done.stderr
    assert "CC BY-NC-SA 4.0" in done.stdout
    card = (output / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card
    assert "gene order is unknown" in card
    loaded = sct.load(output)
    assert loaded.license == "cc-by-nc-sa-4.0"
    arrays = np.load(folder / "io.npz")
    close(loaded.apply(tokens=arrays["tokens"].reshape(2, 4, 256))["logits"], arrays["logits"])


@pytest.mark.slow
def test_genes_given_as_a_file(folder, tmp_path):
    genes = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[:250])
    genes.save(tmp_path / "genes.tsv")
    done = command(f"--input={folder}", f"--output={tmp_path / 'm'}", f"--genes={tmp_path / 'genes.tsv'}")
    assert done.returncode == 0, done.stderr
    assert sct.load(tmp_path / "m").genes.hash == genes.hash
    many = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[:257])
    with pytest.raises(CheckpointError, match="257 genes"):
        haiku_sct.convert(folder, many)


@pytest.mark.slow
@pytest.mark.parametrize("place", [".", "model", "jax_params/model", "../weights", "linked"])
def test_the_input_is_never_the_output(folder, place):
    (folder.parent / "linked").symlink_to(folder, target_is_directory=True)
    output = folder.parent / "linked" if place == "linked" else folder / place
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = command(f"--input={folder}", f"--output={output}", "--genes=none")
    assert done.returncode == 1
    assert "the input folder or a folder inside it" in done.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
