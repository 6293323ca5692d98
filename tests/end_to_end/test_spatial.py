"""Spatial training: it goes on from a model of single cells, and neighbours in a bag are worth something."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sct
from sct.data.bags import BagSource
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.eval.imputation.eval_cells import EvalCells
from sct.eval.imputation.protocols import whole_cell_imputation
from sct.eval.imputation.scoring import ImputationModel
from sct.families.tasks import make_task
from sct.train.experiment import run

ROOT = Path(__file__).resolve().parents[2]


def sections(number: int, side: int, n_genes: int, n_domains: int = 4, seed: int = 0) -> list[ad.AnnData]:
    """Tissue sections of `side` x `side` spots whose domains express other genes and lie elsewhere in each section."""
    rng = np.random.default_rng(seed)
    human = GeneVocabulary.human()
    ids = [human.ensembl_ids[i] for i in np.sort(rng.permutation(len(human))[:n_genes])]
    log_rates = rng.normal(1.0, 0.7, n_genes) + rng.normal(0.0, 1.2, (n_domains, n_genes))
    places = np.stack(np.divmod(np.arange(side * side), side), axis=1).astype(np.float64)
    made = []
    for section in range(number):
        rng = np.random.default_rng([seed, section + 1])
        centers = rng.uniform(0, side, (n_domains, 2))
        domain = np.linalg.norm(places[:, None] - centers, axis=2).argmin(axis=1)
        rates = np.exp(log_rates[domain]) * rng.lognormal(0.0, 0.3, (side * side, 1))
        counts = rng.poisson(rates * rng.gamma(4.0, 0.25, rates.shape)).astype(np.float32)
        made.append(
            ad.AnnData(
                sparse.csr_matrix(counts),
                obs=pd.DataFrame(index=[f"section{section}:{spot}" for spot in range(side * side)]),
                var=pd.DataFrame(index=ids),
                obsm={"spatial": places * 100},
            )
        )
    return made


def store_of(sections: list[ad.AnnData], folder: Path, genes: GeneVocabulary | None = None) -> Store:
    """Store of sections; the last is for testing, the one before for validation."""
    names = [f"section{number}" for number in range(len(sections))]
    genes = genes or GeneVocabulary.human().subset(list(sections[0].var_names))
    options = IngestOptions(validation=(names[-2],), test=(names[-1],))
    ingest(list(zip(names, sections, strict=True)), folder, vocabulary=genes, options=options)
    return Store.open(folder)


def small(name: str, store: Store, **train: Any) -> dict[str, Any]:
    """The :mini variant of a configuration, a few steps long."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("mini")
    config.data.store = str(store.path)
    config.train.update(steps=2, eval_every=2, checkpoint_every=2, log_every=1, eval_records=2, **train)
    config.objective.update(report_seeds=1, report_bags=2)
    config.model.update(embed_dim=32, num_heads=2, ffn_dim=32, num_downsamples=3, num_layers=1)
    return config.to_dict()


@pytest.mark.slow
def test_the_second_stage_goes_on_from_the_first(tmp_path, capsys):
    store = store_of(sections(4, 8, 40), tmp_path / "store")

    def staged(name: str) -> dict[str, Any]:
        config = small(name, store)
        config["model"]["num_downsamples"] = 1
        return config

    first = run(staged("sct_sc"), tmp_path / "cells")
    assert "starts from random parameters" not in capsys.readouterr().out
    config = {**staged("sct_spatial"), "init_from": str(tmp_path / "cells")}
    # So small a rate that what it starts from is what it ends with.
    config["optimizer"] |= {"peak_lr": 1e-30, "init_lr": 1e-30, "final_lr": 0.0}
    run(config, tmp_path / "spots")
    assert "starts from random parameters" not in capsys.readouterr().out
    cells, spots = (sct.load(tmp_path / name) for name in ("cells", "spots"))
    assert first.reason == "finished"
    assert (cells.config.use_spatial, spots.config.use_spatial) == (False, True)
    before, after = cells.variables["params"], dict(spots.variables["params"])
    assert all(np.abs(leaf).max() < 1e-20 for leaf in leaves(after.pop("spatial")))
    assert [leaf.tobytes() for leaf in leaves(before)] == [leaf.tobytes() for leaf in leaves(after)]

    # Without a first stage it says so; the map of coordinates learns.
    run(staged("sct_spatial"), tmp_path / "fresh")
    lines = [line for line in capsys.readouterr().out.splitlines() if "starts from random parameters" in line]
    assert len(lines) == 1
    assert "--config.init_from" in lines[0]
    assert any(np.any(leaf) for leaf in leaves(sct.load(tmp_path / "fresh").variables["params"]["spatial"]))


def leaves(tree: Any) -> list[np.ndarray]:
    if hasattr(tree, "items"):
        return [leaf for _, value in sorted(tree.items()) for leaf in leaves(value)]
    return [np.asarray(tree)]


def trained(store: Store, workdir: Path, spatial_bags: bool, steps: int) -> tuple[Any, Any]:
    """A small sCT that learns to fill in 3 of 8 spots; its task and the variables of the best step of validation."""
    config = small("sct_spatial", store)
    config["data"]["spatial_bags"] = spatial_bags
    config["objective"] |= {"masking": {"kind": "cells", "num_cells": 3}, "max_masked_fraction": 0.0}
    config["model"] |= {"ffn_dim": 64}
    config["optimizer"] |= {"peak_lr": 4e-3, "warmup_steps": 30}
    every = {"eval_every": 100, "checkpoint_every": 100, "log_every": 20}
    config["train"] |= {"steps": steps, "batch_size": 8, "eval_records": 0, "loader_threads": 1, **every}
    run(config, workdir)
    return make_task(config, store)[0], sct.load(workdir / "model").variables


def imputed(task: Any, variables: Any, spatial_bags: bool) -> dict[str, tuple[float, float]]:
    """Whole-cell imputation of the test section: row -> mean MCC and MAE, 2 and 5 of 8 spots hidden."""
    bags = dataclasses.replace(task.bags, with_counts=True, spatial_bags=spatial_bags)
    held_out = EvalCells.read(BagSource(task.store.split("test"), bags, exhaustive=True))
    train = BagSource(task.store.split("train"), bags, exhaustive=True)
    model = ImputationModel(task._probabilities, variables) if variables is not None else None
    outcome = whole_cell_imputation(held_out, model, train, numbers=(2, 5), seeds=2)
    rows = [row for setting in outcome.settings for row in setting.rows if row.mcc]
    return {
        label: (
            float(np.mean([row.mcc for row in rows if row.label == label])),
            float(np.mean([row.mae for row in rows if row.label == label])),
        )
        for label in dict.fromkeys(row.label for row in rows)
    }


def compared(
    store: Store, folder: Path, steps: int
) -> dict[tuple[bool, bool], dict[str, tuple[float, float]]]:
    """(bags of training are spatial, bags of evaluation are spatial) -> results."""
    found = {}
    for trained_on in (True, False):
        task, variables = trained(store, folder / f"spatial_{trained_on}", trained_on, steps)
        for asked_in in (True, False):
            found[trained_on, asked_in] = imputed(task, variables, asked_in)
    (folder / "compared.json").write_text(
        json.dumps({str(key): value for key, value in found.items()}, indent=1)
    )
    for key, rows in found.items():
        print(f"trained on spatial bags {key[0]}, asked in spatial bags {key[1]}: {rows}")
    return found


@pytest.mark.slowest
def test_spatial_bags_beat_random_bags_on_simulated_domains(tmp_path):
    found = compared(store_of(sections(8, 16, 64), tmp_path / "store"), tmp_path, steps=300)
    spatial, random = found[True, True], [found[False, asked] for asked in (True, False)]
    for told in ("model", "model, given expressed"):
        for other in random:
            assert spatial[told][0] > other[told][0] + 0.05, (told, found)
            assert spatial[told][1] < 0.9 * other[told][1], (told, found)
    # It has learned what the neighbours tell, and that is more than the section's most common levels.
    (bar,) = [name for name in spatial if name.startswith("most common expressed") and "other cells" in name]
    assert spatial["model, given expressed"][0] > spatial[bar][0] + 0.08, found


def test_neighbours_tell_more_than_random_spots_in_real_tissue(shared_data, tmp_path):
    """Eight breast tumours, too few for a model as small as above to carry over: the neighbours speak alone."""
    file = shared_data / "spatial" / "st_breast_her2.h5ad"
    if not file.is_file():
        pytest.skip(f"{file.name} is not among the optional data")
    spots = ad.read_h5ad(file)
    columns = GeneVocabulary.human().align(spots.var).columns
    common = np.argsort(-np.where(columns >= 0, np.asarray(spots.X.mean(axis=0)).ravel(), -1))[:64]
    sections = [spots[spots.obs["batch"] == name].copy() for name in sorted(spots.obs["batch"].unique())]
    ids = [GeneVocabulary.human().ensembl_ids[column] for column in np.sort(columns[common])]
    store = store_of(sections, tmp_path / "store", GeneVocabulary.human().subset(ids))
    task = make_task(small("sct_spatial", store), store)[0]
    spatial, random = (imputed(task, None, flag) for flag in (True, False))
    visible = [label for label in spatial if "nearest" in label]
    assert visible
    for label in visible:
        assert spatial[label][0] > random[label][0] + 0.03, (label, spatial, random)
        assert spatial[label][1] < random[label][1], (label, spatial, random)
