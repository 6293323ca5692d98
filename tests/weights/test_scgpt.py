"""scGPT folders: what is read agrees with published outputs, and what is written is read again."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import sct
from sct.errors import CheckpointError, MissingExtraError
from sct.families import converters
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.nn.paths import flatten
from sct.weights import scgpt
from tests.random_models import random_model
from tests.weights.scgpt_folders import GOLDEN, golden_arrays, respelt, write

ARGS, VOCAB = (json.loads((GOLDEN / name).read_text()) for name in ("args.json", "vocab.json"))
NO_TORCH = "torch is not installed: it reads and writes best_model.pt (pip install torch)"


@pytest.fixture(scope="module")
def arrays():
    return golden_arrays()


@pytest.fixture(scope="module")
def golden(arrays, tmp_path_factory):
    return scgpt.convert(write(tmp_path_factory.mktemp("golden"), arrays))


def outputs(model):
    io = np.load(GOLDEN / "io.npz")
    inputs = {name: io[name] for name in ("gene_ids", "values", "padding_mask")}
    with jax.default_matmul_precision("highest"):
        return model.apply(**inputs), io


def check_golden(model) -> None:
    found, io = outputs(model)
    wrong = []
    for name in ("encoder_output", "mlm_output", "cell_emb", "cls_output", "mvc_output"):
        ours, theirs = np.asarray(found[name]), io[name]
        assert ours.shape == theirs.shape, name
        if ours.shape[:2] == io["padding_mask"].shape:
            ours, theirs = ours[~io["padding_mask"]], theirs[~io["padding_mask"]]
        difference = float(np.abs(ours - theirs).max())
        wrong += [f"{name}: {difference:.1e}"] if not difference <= 1e-5 else []
    assert not wrong


def test_outputs_agree_with_the_published_ones(golden, arrays, tmp_path):
    assert np.load(GOLDEN / "io.npz")["padding_mask"].any()
    check_golden(golden)
    check_golden(scgpt.convert(write(tmp_path / "respelt", respelt(arrays))))


def test_shared_goldens_are_those_of_this_repository(shared_goldens):
    for file in GOLDEN.iterdir():
        assert (shared_goldens / "scgpt" / file.name).read_bytes() == file.read_bytes(), file.name


def test_published_files_convert_by_command(tmp_path):
    pytest.importorskip("torch", reason=NO_TORCH)
    converters()["scgpt"].read(GOLDEN, tmp_path / "model", "float32", None, False)
    model = sct.load(tmp_path / "model")
    check_golden(model)
    assert "batch discriminator" in model.card
    assert "MVC head" not in model.card
    converters()["scgpt"].write(model, tmp_path / "back", "float32")
    import torch

    ours, theirs = (torch.load(at / "best_model.pt", weights_only=True) for at in (tmp_path / "back", GOLDEN))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "back" / "vocab.json").read_text()) == VOCAB
    written = json.loads((tmp_path / "back" / "args.json").read_text())
    assert {name: written[name] for name in ARGS} == ARGS


def test_torch_is_asked_for_where_it_is_needed(golden, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"best_model\.pt.*torch"):
        scgpt.save(golden, tmp_path / "new")
    with pytest.raises(MissingExtraError, match="torch"):
        scgpt.convert(GOLDEN)
    assert not (tmp_path / "new").exists()


def test_a_torch_that_may_run_code_of_files_reads_none(monkeypatch):
    for version in ("2.5.1+cpu", "1.13.0"):
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
        with pytest.raises(CheckpointError, match=rf"torch {re.escape(version)}.*2\.6"):
            scgpt.convert(GOLDEN)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / "folder"
    shutil.copytree(GOLDEN, folder)
    torch.save({"encoder.embedding.weight": Command()}, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match=r"malicious") as caught:
        scgpt.convert(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# Every head and form, in models of every kind of values.
_BASE = {
    "vocab_size": 63, "pad_id": VOCAB["<pad>"], "cls_id": VOCAB["<cls>"], "embed_dim": 32, "num_layers": 2,
    "num_heads": 4, "ffn_dim": 48, "num_bins": 51,
}  # fmt: skip
FORMS = (
    {"mvc": "inner product, detach", "num_classes": 3, "num_batches": 2, "dab": True, "domain_norm": "affine",
     "explicit_zero": True, "flags": True, "cell_embedding": "w-pool"},
    {"mvc": "concat query", "values": "category", "pad_value": 51.0, "mask_value": 52.0, "num_batches": 3},
    {"mvc": "sum query", "values": "scaling", "norm": "pre", "num_classes": 2, "classifier_layers": 2},
    {"mvc": "inner product", "num_batches": 2, "use_batch_labels": False, "domain_norm": "plain"},
    {"value_head": False, "num_batches": 2, "use_batch_labels": False, "dab": True, "cell_embedding": "avg-pool"},
)  # fmt: skip


def test_every_head_survives_a_round_trip(golden, tmp_path):
    wrong = []
    for number, form in enumerate(FORMS):
        config = CellEncoderConfig(**{**_BASE, **form})
        model = random_model(
            "scgpt", config, genes=golden.genes, data={**golden.data, "gene_rows": list(range(60))}
        )
        folder = write(
            tmp_path / str(number), scgpt.arrays(model), json.loads(json.dumps(scgpt._args(model))), VOCAB
        )
        back = scgpt.convert(folder)
        if back.config != config:
            wrong.append(f"{form}: {set(vars(back.config).items()) ^ set(vars(config).items())}")
        ours, theirs = flatten(model.variables), flatten(back.variables)
        if set(ours) != set(theirs) or not all(np.array_equal(ours[path], theirs[path]) for path in ours):
            wrong.append(f"{form}: arrays")
        if form.get("domain_norm") and not any("num_batches_tracked" in name for name in scgpt.arrays(model)):
            wrong.append("num_batches_tracked")
    assert not wrong


def test_parts_that_a_folder_lacks_are_listed(golden):
    assert "lacks weights of: zero probabilities, batch labels, batch discriminator" in golden.card
    assert set(golden.apply(gene_ids=[[61]], values=np.zeros((1, 1), np.float32))) == {
        "encoder_output", "cell_emb", "mlm_output", "cls_output", "mvc_output"
    }  # fmt: skip


def test_names_keep_their_rows(arrays, tmp_path, golden):
    """Names of the human table, old names, names that only the file knows, and specials."""
    names = [
        "GENE0",
        "SEPT7",
        "SEPTIN7",
        "CD4",
        "ENSG00000012048",
        "KIAA1804",
        "MARCH5",
        *(f"LOC{i}" for i in range(53)),
    ]
    rows = np.random.default_rng(0).permutation(63).tolist()
    vocab = dict(zip([*names, "<pad>", "<cls>", "<eoc>"], rows, strict=True))
    model = scgpt.convert(write(tmp_path / "named", arrays, vocab=vocab))
    assert (model.config.pad_id, model.config.cls_id) == (vocab["<pad>"], vocab["<cls>"])
    assert len(model.genes) == 60
    row_of = model.data["gene_rows"]
    # An old name is read as the gene it names today, unless the file has the new name as well.
    for name, old in (
        ("SEPTIN7", "SEPTIN7"),
        ("CD4", "CD4"),
        ("BRCA1", "ENSG00000012048"),
        ("MARCHF5", "MARCH5"),
    ):
        assert row_of[int(model.genes.find([name])[0])] == vocab[old], name
    assert row_of[model.genes.symbols.index("SEPT7")] == vocab["SEPT7"]
    assert row_of[model.genes.symbols.index("LOC3")] == vocab["LOC3"]
    assert scgpt._vocab(model) == vocab
    for text in (
        "5 of them are genes", "3 of these get another symbol", "54 unknown or ambiguous and 1 other names",
    ):  # fmt: skip
        assert text in " ".join(model.card.split()), text
    assert golden.data["max_genes"] == ARGS["max_seq_len"] - 1


def test_names_of_one_gene_keep_their_own_rows():
    """A symbol, an id, ids with versions and old names of one gene, in any order: each leads to its own row."""
    gene = "ENSG00000012048"
    wrong = []
    for names in (
        ["BRCA1", gene], ["BRCA1", f"{gene}.5"], ["RNF53", "BRCA1"], [f"{gene}.5", f"{gene}.7"], [gene, f"{gene}.5"],
        ["BRCA1", gene, f"{gene}.5", "RNF53"], ["ENSG00000999999.1", "ENSG00000999999"],
    ):  # fmt: skip
        for ordered in (names, names[::-1]):
            genes, _ = scgpt._vocabulary(ordered)
            found = {name: int(genes.find([name])[0]) for name in ordered if "." not in name}
            wrong += [f"{ordered}: {name}" for name, at in found.items() if ordered[at] != name]
    assert not wrong
    assert scgpt._vocabulary(["RNF53"])[0].symbols == ("BRCA1",)


def test_options_of_the_format_that_are_missing_are_listed(golden):
    for option in (
        "cell_emb_style = cls",
        "mvc_decoder_style = inner product",
        "norm_scheme = post",
        "input_style",
    ):
        assert option in golden.card
    assert "embsize" not in golden.card.partition("lacks these options")[2].partition("\n")[0]


def test_what_a_model_reads_survives_a_round_trip(golden, tmp_path):
    """Which genes, the kind of values, the names of batches, and the order of the rows."""
    config = CellEncoderConfig(**{**_BASE, "num_batches": 2, "max_value": 9.0})
    rows = np.random.default_rng(0).permutation(60).tolist()
    batches = {"batch_key": "donor", "batches": ["b", "a"]}
    wrong = []
    for number, data in enumerate((
        {"genes": "all", "max_genes": 0, "values": "log1p"}, {"genes": "top", "max_genes": 7, "values": "levels"},
        {"genes": "hvg", "max_genes": 3, "values": "quantiles", "listed": [2, 9, 40], **batches},
        {"genes": "sampled", "max_genes": 20, "values": "quantiles"},
    )):  # fmt: skip
        model = random_model("scgpt", config, genes=golden.genes, data={**data, "gene_rows": rows})
        args = json.loads(json.dumps(scgpt._args(model)))
        folder = write(tmp_path / str(number), scgpt.arrays(model), args, scgpt._vocab(model))
        back = scgpt.convert(folder)
        named = {**data}
        if "listed" in data:
            named.pop("listed")
            genes = [[m.genes.keys[at] for at in m.data["listed"]] for m in (model, back)]
            wrong += [] if set(genes[0]) == set(genes[1]) else [f"{data}: {genes}"]
        wrong += [f"{data}: {name}" for name, value in named.items() if back.data[name] != value]
        wrong += [] if back.config == config else [f"{data}: configuration"]
    assert not wrong


def test_folders_that_do_not_fit_are_refused(arrays, tmp_path):
    """One sentence each, which names the file, the option or the array."""

    def without(mapping, *names):
        return {name: value for name, value in mapping.items() if name not in names}

    reshaped = {**arrays, "decoder.fc.4.weight": np.zeros((2, 32), np.float32)}
    valueless = without(arrays, *(name for name in arrays if name.startswith("value_encoder")))
    infinite = {**arrays, "decoder.fc.4.bias": np.full(1, np.inf, np.float32)}
    cases = [
        (without(arrays, "decoder.fc.2.weight"), {}, "value_head|decoder.fc.2.weight"),
        ({**arrays, "bn.weight": np.ones(32, np.float32)}, {}, "bn.weight"),
        (reshaped, {}, "decoder.fc.4.weight"),
        (infinite, {}, "decoder.fc.4.bias"),
        (without(arrays, "encoder.embedding.weight"), {}, "encoder.embedding.weight"),
        (arrays, {"args": without(ARGS, "nheads")}, "nheads"),
        (arrays, {"args": {**ARGS, "nheads": 5}}, "num_heads"),
        (arrays, {"args": {**ARGS, "nlayers": 3}}, "layers.2"),
        (arrays, {"args": {**ARGS, "embsize": "32"}}, "embsize"),
        (arrays, {"args": {**ARGS, "input_emb_style": "category"}}, "input_emb_style"),
        (arrays, {"args": {**ARGS, "max_seq_len": 0}}, "max_seq_len"),
        (arrays, {"args": {**ARGS, "pad_value": "auto"}}, "pad_value"),
        (arrays, {"args": [1]}, "args.json"),
        (arrays, {"args": {**ARGS, "pre_norm": "False"}}, "pre_norm"),
        (arrays, {"args": {**ARGS, "norm_scheme": True}}, "norm_scheme"),
        (arrays, {"args": {**ARGS, "pre_norm": True, "norm_scheme": "post"}}, "norm_scheme"),
        (arrays, {"args": {**ARGS, "input_style": "normed_raw"}}, "input_style"),
        (arrays, {"args": {**ARGS, "mvc_decoder_style": "outer"}}, "mvc_decoder_style"),
        (arrays, {"args": {**ARGS, "mvc_decoder_style": "sum query"}}, "mvc_decoder_style"),
        (arrays, {"args": {**ARGS, "pad_token": ["<pad>"]}}, "pad_token"),
        (arrays, {"args": {**ARGS, "sct": {"max_value": "9"}}}, "max_value"),
        (arrays, {"args": {**ARGS, "sct": {"genes": "some"}}}, "genes"),
        (arrays, {"args": {**ARGS, "sct": {"genes": "hvg", "listed": [99]}}}, "listed"),
        (arrays, {"args": {**ARGS, "sct": {"batches": ["one"]}}}, "batches"),
        (valueless, {"args": without(ARGS, "input_emb_style")}, "input_emb_style"),
        (arrays, {"vocab": {**without(VOCAB, next(iter(VOCAB))), "A|B": VOCAB[next(iter(VOCAB))]}}, "vocab.json"),
        (arrays, {"vocab": {**without(VOCAB, next(iter(VOCAB))), "": VOCAB[next(iter(VOCAB))]}}, "vocab.json"),
        (arrays, {"vocab": without(VOCAB, "<cls>")}, "<cls>"),
        (arrays, {"vocab": {**VOCAB, "X": 63}}, "vocab.json"),
        (arrays, {"vocab": {**VOCAB, "X": 1}}, "vocab.json"),
        (arrays, {"vocab": {**VOCAB, "X": "1"}}, "vocab.json"),
    ]  # fmt: skip
    wrong = []
    for number, (given, files, named) in enumerate(cases):
        folder = write(tmp_path / str(number), given, files.get("args"), files.get("vocab"))
        try:
            scgpt.convert(folder)
            wrong.append(f"{number} {named}: accepted")
        except CheckpointError as error:
            if not any(name in str(error) for name in named.split("|")):
                wrong.append(f"{number} {named}: {error}")
    for name in ("args.json", "vocab.json", "model.safetensors"):
        folder = write(tmp_path / name, arrays)
        Path(folder, name).unlink()
        try:
            scgpt.convert(folder)
            wrong.append(f"without {name}: accepted")
        except CheckpointError as error:
            wrong += [] if name in str(error) else [f"without {name}: {error}"]
    assert not wrong, "\n".join(wrong)


def test_adapters_and_other_families_are_not_written(golden, tmp_path):
    import dataclasses

    adapted = {**golden.variables, "adapters": {"gene": {"lora_a": np.zeros((1, 1))}}}
    pytest.importorskip("torch", reason=NO_TORCH)
    with pytest.raises(CheckpointError, match="adapter"):
        scgpt.save(dataclasses.replace(golden, variables=adapted), tmp_path / "a")
    diverged = {"params": {**golden.variables["params"], "gene": {"embedding": np.full((63, 32), np.nan)}}}
    with pytest.raises(CheckpointError, match=r"encoder\.embedding"):
        scgpt.save(dataclasses.replace(golden, variables=diverged), tmp_path / "c")
    with pytest.raises(CheckpointError, match="bert"):
        scgpt.save(dataclasses.replace(golden, family="bert"), tmp_path / "b")
    assert not list(tmp_path.iterdir())
