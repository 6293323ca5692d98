"""Files for people who cite, report, propose and commit: they parse, and agree with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sct.version import __version__

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "CITATION.cff").is_file(), reason="needs a clone of the repository"
)


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_names_the_version_and_every_paper():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == __version__
    assert citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The sct authors"}]
    assert len(citation["references"]) == 6
    # What the schema of CFF 1.2.0 requires of a reference and allows for a person or an entity.
    kinds = {"article", "conference-paper", "unpublished"}
    for paper in citation["references"]:
        assert {"type", "title", "authors"} <= set(paper)
        assert paper["type"] in kinds
        for author in paper["authors"]:
            assert set(author) in ({"name"}, {"given-names", "family-names"}), author
    from sct import families

    titles = " ".join(paper["title"].lower() for paper in citation["references"])
    for family in families.all_families().values():
        assert re.sub(r"\s*\(.*\)", "", family.paper).lower() in titles, family.name


def test_issue_forms_have_what_github_requires():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert {form.stem for form in forms} == {"bug", "config", "feature"}
    for form in forms:
        content = read(str(form.relative_to(ROOT)))
        if form.stem == "config":
            assert content["blank_issues_enabled"] is True
            continue
        assert content["name"]
        assert content["description"]
        names = [each["id"] for each in content["body"]]
        assert len(set(names)) == len(names)
        for each in content["body"]:
            assert each["type"] in ("textarea", "input", "dropdown", "checkboxes")
            assert each["attributes"]["label"]
    assert "- [ ]" in (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()


def test_commit_hooks_use_the_tested_versions_and_keep_outputs_of_notebooks():
    config = read(".pre-commit-config.yaml")
    hooks = {hook["id"]: (repo, hook) for repo in config["repos"] for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "check-yaml", "check-added-large-files", "mypy"} <= set(hooks)
    assert "nbstripout" not in hooks
    assert hooks["mypy"][1]["stages"] == ["manual"]
    for file in (ROOT / "constraints").glob("*.txt"):
        tested = re.search(r"^ruff==(\S+)", file.read_text(), re.MULTILINE)
        if tested:
            assert hooks["ruff-check"][0]["rev"] == f"v{tested[1]}", file.name


def test_the_hardware_table_repeats_measured_figures():
    """Times and memory of the full model stand in both pages, so that they cannot drift apart."""
    performance = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| `sct_sc\.py`.*$", (ROOT / "docs" / "hardware.md").read_text(), re.MULTILINE)
    full = [row for row in rows if "1 bag" in row]
    assert len(full) == 4
    for row in full:
        cells, seconds, tokens, memory = re.search(
            r"1 bag of (\d+) cells \| `\w+` \| ([\d.]+) s \| ([\d,]+) \| ([\d.]+) GiB", row
        ).groups()
        assert re.search(rf"{cells} cells \| `\w+` \| {seconds} s .*\| {memory} GiB", performance), row
        computed = int(cells) * 19_968 / float(seconds)
        assert float(tokens.replace(",", "")) == pytest.approx(computed, rel=0.01), row
