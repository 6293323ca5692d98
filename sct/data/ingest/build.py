"""Build a store from input files: validate, align genes, shuffle and write.

Several processes can share the work. An interrupted ingest can be resumed. A store can be opened only when it is
complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sct import messages
from sct.atomic import remove, write_json
from sct.data.counts import COUNTS
from sct.data.genes.orthologs import Orthologs
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.input_files import Input, find_inputs
from sct.data.ingest.inputs import IngestOptions, absolute_location
from sct.data.ingest.splits import assign_splits, check_splits
from sct.data.ingest.workers import IngestJob, run_jobs
from sct.data.store import (
    ACTIVITY_VERSION,
    GENES,
    GROUPS,
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    STUDIES,
    check_study,
    read_manifest,
)
from sct.errors import ConfigError, DataError, StoreError
from sct.hashes import hash_file, sealed
from sct.outputs import check_room, size_of
from sct.version import __version__

if TYPE_CHECKING:
    import anndata
    from rich.table import Table

__all__ = ["IngestOptions", "IngestReport", "ingest", "main"]

# Name of the last manifest while a study is rebuilt. Without manifest.json the store cannot be opened in that time.
_PREVIOUS = "manifest.previous.json"
# Temporary files of an interrupted ingest, in this and earlier releases. Only these are removed from the output.
_LEFT_IN_ROOT = re.compile(r"\.(manifest\.json|genes\.tsv)\.([0-9a-f]{16}\.tmp|partial)")
_LEFT_IN_STUDIES = re.compile(r"\..+\.([0-9a-f]{16}\.tmp|partial|spill|download)")


@dataclass(frozen=True)
class IngestReport:
    """Report the result of an ingest (the conversion of input files to a store).

    Attributes
    ----------
    path
        Folder of the store.
    studies
        Entries of the manifest, one per study.
    kept
        Names of the studies that an earlier ingest wrote and that have not changed.
    refused
        Dict from the location of each refused input to the reason why it was left out.
    notes
        Warnings and remarks for the user.
    """

    path: Path
    studies: list[dict[str, Any]]
    kept: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Return a `rich` table that has one row per study and fits the width of the terminal."""
        from sct import terminal

        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "study": lambda each: each["name"],
            "split": lambda each: each["split"],
            "order": lambda each: each["order"],
            "cells": lambda each: f"{each['n_cells']:,}",
            "dropped": lambda each: f"{sum(each['dropped'].values()):,}",
            "genes matched": lambda each: f"{each['n_genes_matched']:,}",
            "genes per cell": lambda each: f"{each['median_nnz_per_cell']:,.0f}",
            "why dropped": lambda each: ", ".join(f"{n:,} {why}" for why, n in each["dropped"].items()),
            "counts from": lambda each: each["counts_from"],
        }
        # A text that is the same for all studies takes no column.
        texts = {
            name: {columns[name](each) for each in self.studies}
            for name in ("order", "why dropped", "counts from")
        }
        same = {name: values.pop() for name, values in texts.items() if len(values) == 1}
        shown = {name: text for name, text in columns.items() if name not in same}
        rows = [[text(each) for text in shown.values()] for each in self.studies]
        numeric = [name in ("cells", "dropped", "genes matched", "genes per cell") for name in shown]
        notes = [f"{name} (all studies): {text}" for name, text in same.items() if text]
        return terminal.table(terminal.Content("Studies", list(shown), rows, numeric, (), notes))

    def summary(self) -> str:
        """Return a line with the path of the store and the numbers of studies, cells and dropped cells."""
        total = sum(each["n_cells"] for each in self.studies)
        dropped = sum(sum(each["dropped"].values()) for each in self.studies)
        splits = Counter(each["split"] for each in self.studies)
        parts = ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split])
        return (
            f"{self.path}: {len(self.studies)} {'study' if len(self.studies) == 1 else 'studies'} ({parts}), "
            f"{total:,} cells; {dropped:,} cells dropped"
        )

    def print(self) -> None:
        """Print the summary, the table, the refused inputs and the notes to standard output."""
        console = messages.console()
        console.print(self.summary(), soft_wrap=True, highlight=False)
        console.print(self.table())
        for location, reason in self.refused.items():
            console.print(f"left out: {reason if location in reason else f'{location}: {reason}'}")
        for note in self.notes:
            console.print(note, highlight=False)


def ingest(
    inputs: Sequence[str | Path | tuple[str, anndata.AnnData]],
    output: str | Path,
    *,
    vocabulary: GeneVocabulary | None = None,
    options: IngestOptions | None = None,
) -> IngestReport:
    """Create a store, or add studies to an existing one.

    Inputs that were already ingested and have not changed are skipped, so running the same command again resumes an
    interrupted ingest. The store can be opened only after the ingest is complete.

    Parameters
    ----------
    inputs
        Files, folders and ids (see `sct.data.ingest.input_files.find_inputs`), or `(name, AnnData)` pairs.
    output
        Folder of the store.
    vocabulary
        Gene vocabulary (G genes). Default: the human protein-coding genes.
    options
        See `IngestOptions`.

    Returns
    -------
    A report with the studies of the store, the notes and the refused inputs.

    Raises
    ------
    DataError
        Some inputs were refused, or the ortholog table is invalid. Studies of the other inputs are complete and stay
        in the store folder.
    ConfigError
        Options contradict each other, or list studies that do not exist.
    StoreError
        The output folder cannot be written, or holds a store with another gene vocabulary.
    """
    options = options or IngestOptions()
    vocabulary = vocabulary or GeneVocabulary.human()
    check_splits(options.validation, options.test)
    table = options.read_orthologs(vocabulary)  # once, and before anything is written
    root = Path(output)
    found, ignored = find_inputs(inputs, exclude=root)
    _check_room(root)
    with _only_one(root):
        before, notes = _before(root, vocabulary)
        jobs, kept, refused = _plan(root, found, vocabulary, options, table)
        _check_room(root, [job.item for job in jobs])
        if options.study_key is None:
            known = {each["name"] for each in before} | {each.name for each in found}
            check_splits(options.validation, options.test, known)
        replaced = {name for job in jobs for name in job.stale}
        if replaced & {each["name"] for each in before} and (root / MANIFEST).is_file():
            os.replace(root / MANIFEST, root / _PREVIOUS)
        fresh, more = run_jobs(root, jobs, vocabulary, options)
        refused.update(more)
        if refused and not (options.skip_bad and (fresh or kept)):
            _restore(root)
            _refuse(refused, len(found))
        # Keep the old studies of an input that was refused this time.
        left = [each for each in before if each["name"] in replaced and _unchanged(root, each)]
        records = {each["name"]: each for each in before if each["name"] not in replaced or each in left}
        records.update({each["name"]: each for each in (*kept, *fresh)})
        report = _finish(root, records, before, vocabulary, options)
    notes += [f"{each} is not a 10x count matrix and was left out" for each in ignored]
    notes += [f"{each['name']} was not updated and keeps its earlier content" for each in left]
    notes += [note for each in (*kept, *fresh) for note in each["notes"]]
    return replace(
        report,
        kept=tuple(sorted(each["name"] for each in kept)),
        refused=refused,
        notes=(*notes, *report.notes),
    )


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Create the store folder, lock it against other ingests, and remove temporary files of an interrupted ingest."""
    made = not root.exists()
    try:
        (root / STUDIES).mkdir(parents=True, exist_ok=True)
        if (root / STUDIES).is_symlink():
            raise StoreError(
                f"{root / STUDIES} is a symbolic link, but must be a folder of the store: replace the link with a "
                "folder, or choose another output."
            )
        lock = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"{root} cannot be written ({error.strerror}): choose another output.") from error
    try:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another ingest is writing to {root}: wait until it has finished.") from None
        except (ImportError, OSError):
            pass  # this file system has no locks, so the user must run only one ingest at a time
        for folder, pattern in ((root, _LEFT_IN_ROOT), (root / STUDIES, _LEFT_IN_STUDIES)):
            for path in folder.iterdir():
                if pattern.fullmatch(path.name) and (folder != root or path.is_symlink() or path.is_file()):
                    remove(path)
        yield
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):  # removes only empty folders
            (root / STUDIES).rmdir()
            if made:
                root.rmdir()


def _before(root: Path, vocabulary: GeneVocabulary) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the studies that the store had before, and notes about a damaged manifest or missing studies."""
    try:
        manifest = read_manifest(root) or read_manifest(root, _PREVIOUS)
    except StoreError as error:
        return [], [f"the old manifest was replaced: {error}"]
    if manifest is None:
        return [], []
    if manifest["vocabulary"]["hash"] != vocabulary.hash:
        raise StoreError(
            f"the store {root} has the gene vocabulary {manifest['vocabulary']['name']!r} "
            f"({manifest['vocabulary']['hash']}), but this ingest uses {vocabulary.name!r} ({vocabulary.hash}): "
            "choose another output, or ingest with the vocabulary of the store."
        )
    present = [each for each in manifest["studies"] if (root / each["path"] / "zarr.json").is_file()]
    missing = [each["name"] for each in manifest["studies"] if each not in present]
    return present, [f"{name} was in the store, but its folder is missing" for name in missing]


def _check_room(root: Path, inputs: Sequence[Input] = ()) -> None:
    """Raise `StoreError` if the output cannot be written or the disk lacks space for the inputs."""
    files = (Path(each.location) for each in inputs if each.adata is None and each.kind != "census")
    # An input that stores every zero may be a hundred times larger than its store.
    least = sum(map(size_of, files)) // 100
    try:
        check_room(root, "--output", least)
    except ConfigError as error:
        raise StoreError(str(error)) from error


def _unchanged(root: Path, record: dict[str, Any]) -> bool:
    """Return whether the metadata file of a study still equals the entry of this study in the manifest."""
    try:
        current = json.loads((root / STUDIES / f"{record['name']}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return {**current, "split": record["split"]} == record


def _restore(root: Path) -> None:
    """Restore the last manifest, so that the store can be opened as before.

    If one of the studies in this manifest has changed, do nothing.
    """
    with contextlib.suppress(StoreError):
        manifest = read_manifest(root, _PREVIOUS)
        if manifest is not None and all(_unchanged(root, each) for each in manifest["studies"]):
            os.replace(root / _PREVIOUS, root / MANIFEST)


def _plan(
    root: Path,
    found: list[Input],
    vocabulary: GeneVocabulary,
    options: IngestOptions,
    table: Orthologs | None,
) -> tuple[list[IngestJob], list[dict[str, Any]], dict[str, str]]:
    """Return the inputs to ingest, the metadata of studies already ingested, and the reason for each refused input."""
    records: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((root / STUDIES).glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            source = record["source"]
            made = records.setdefault(source["input"], [])
            record["name"], record["path"], set(source["siblings"])
            source["fingerprint"], source["location"], source["options"], source["vocabulary"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # Check the names, because the folders with these names are deleted if the input has changed.
        _check_record(record, file)
        made.append(record)
    digest = options.digest(table)
    jobs: list[IngestJob] = []
    kept: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for item in found:
        try:
            fingerprint = item.fingerprint()
        except DataError as error:
            refused[item.location] = str(error)
            continue
        done = records.get(item.name, [])
        if done and done[0]["source"]["fingerprint"] != fingerprint:
            location = done[0]["source"]["location"]
            if location != absolute_location(item):
                refused[item.location] = (
                    f"{item.location} would replace the study {item.name!r}, which was made from {location}: give it "
                    "another name as NAME=PATH."
                )
                continue
        wanted = (fingerprint, digest, vocabulary.hash)
        complete = bool(done) and {each["name"] for each in done} == set(done[0]["source"]["siblings"])
        for each in done:
            source = each["source"]
            present = (root / each["path"] / "zarr.json").is_file()
            # Studies of early releases have no hashes. Ingest them again, as their files may have changed since.
            complete &= present and set(GROUPS) <= set(each.get("hashes") or ())
            complete &= (source["fingerprint"], source["options"], source["vocabulary"]) == wanted
        if complete:
            kept += done
        else:
            jobs.append(IngestJob(item, fingerprint, tuple(each["name"] for each in done), table))
    return jobs, kept, refused


def _check_record(record: dict[str, Any], file: Path) -> None:
    """Raise `StoreError` if the metadata file of a study describes another study."""
    check_study(record, file)
    if record["name"] != file.stem:
        raise StoreError(
            f"{file} describes the study {record['name']!r}, but must describe {file.stem!r}: delete the file, and "
            "run the ingest again."
        )


def _refuse(refused: dict[str, str], n_inputs: int) -> None:
    """Raise `DataError` with the reasons of all refused inputs."""
    reasons = list(refused.values())
    if n_inputs == 1:
        raise DataError(reasons[0])
    listed = " | ".join(reasons)
    raise DataError(
        f"{len(reasons)} of {n_inputs} inputs were refused ({listed}), so the store is not complete: correct these "
        "inputs, or run again with --skip_invalid to skip them (finished inputs are kept)."
    )


def _finish(
    root: Path,
    records: dict[str, dict[str, Any]],
    before: list[dict[str, Any]],
    vocabulary: GeneVocabulary,
    options: IngestOptions,
) -> IngestReport:
    """Assign the splits, write the gene vocabulary and finally the manifest, and return the report."""
    names = sorted(records)
    splits, note = assign_splits(
        names,
        {each["name"]: each["split"] for each in before},
        validation=options.validation,
        test=options.test,
        fraction=options.validation_fraction,
        seed=options.seed,
    )
    studies = [{**records[name], "split": splits[name]} for name in names]
    manifest = {
        "schema_version": SCHEMA_VERSION
        if all(each.get("values", COUNTS) == COUNTS for each in studies)
        else ACTIVITY_VERSION,
        "sct_version": __version__,
        "studies": studies,
    }
    try:
        vocabulary.save(root / GENES)
        facts = {"name": vocabulary.name, "hash": vocabulary.hash, "n_genes": len(vocabulary)}
        manifest["vocabulary"] = {**facts, "sha256": hash_file(root / GENES)}
        write_json(root / MANIFEST, sealed(manifest))
        (root / _PREVIOUS).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"{root} could not be written ({error.strerror}): free disk space, then run the ingest again to resume."
        ) from error
    return IngestReport(root, studies, notes=(note,))


def main(inputs: Sequence[str], output: str | None, *, genes: str | None = None, **options: Any) -> None:
    """Run `ingest` for the command line and print its report.

    Parameters
    ----------
    inputs, output
        See `ingest`.
    genes
        File of a gene vocabulary. Default: the human protein-coding genes.
    **options
        Fields of `IngestOptions`.

    Raises
    ------
    ConfigError
        No output folder was given, or an option of `ingest` is invalid.
    """
    if not output:
        raise ConfigError("--output is missing: set it to the folder of the store.")
    vocabulary = GeneVocabulary.load(genes) if genes else None
    given = [part for text in inputs for part in ([text] if Path(text).exists() else text.split(","))]
    report = ingest(
        list(filter(None, given)), output, vocabulary=vocabulary, options=IngestOptions(**options)
    )
    report.print()
