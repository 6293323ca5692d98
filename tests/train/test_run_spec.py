"""A configuration is checked and resolved once, before any file is read."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from sct.errors import ConfigError
from sct.models import registry
from sct.tasks.cell_sentences import CellSentencesConfig, SentenceData
from sct.train import resume
from sct.train.run_spec import RunSpec

from .conftest import CONFIG, merged

TEXTS = {
    "family": "gpt2",
    "task": "cell_sentences",
    "init_from": "nowhere",
    "data": {"store": "nowhere", "studies": "studies.yaml", "length": 64},
    "objective": {"prompts": "prompts.json"},
    "train": {"seed": 3, "batch_size": 4},
}


def test_a_spec_holds_what_a_configuration_says():
    spec = RunSpec.of(TEXTS)
    assert (spec.family, spec.task, spec.init_from, spec.steps) == ("gpt2", "cell_sentences", "nowhere", 0)
    assert spec.data == SentenceData(store="nowhere", studies="studies.yaml", length=64)
    assert spec.objective == CellSentencesConfig(prompts="prompts.json")
    assert (spec.loop.seed, spec.loop.batch_size, spec.data.text_length) == (3, 4, 64)
    assert spec.files == {"data.studies": "studies.yaml", "objective.prompts": "prompts.json"}
    assert spec.values == TEXTS
    assert RunSpec.of(CONFIG).files == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.steps = 1  # type: ignore[misc]


def test_a_spec_records_options_that_earlier_runs_did_not_have():
    without = {name: value for name, value in CONFIG.items() if name != "objective"}
    assert RunSpec.of(without).values["objective"] == {"logit_adjustment": True}
    assert "objective" not in without


def test_mistakes_are_found_before_a_file_is_read():
    absent = merged(CONFIG, data__store="nowhere")
    cases = {
        "mdoel": {**absent, "mdoel": {}},
        "named options": {**absent, "data": None},
        "family": {**absent, "family": "gtp2"},
        "task": {**absent, "task": "masking"},
        "train.steps": merged(absent, train__steps=-1),
        "train.batch_size": merged(absent, train__batch_size=0),
        "peak_lr": merged(absent, optimizer__peak_lr=-1.0),
        "max_masked_fraction": merged(absent, objective__max_masked_fraction=2.0),
        "an option of data is": merged(absent, data__lenght=1),
        "objective.lora": merged(TEXTS, objective__lora={"rank": 4}, adapters={"kind": "prefix"}),
        "accepts only the adapters of its task": {
            **absent,
            "family": "zeromics",
            "task": "instructions",
            "init_from": "nowhere",
            "model": {},
            "objective": {},
            "data": {"store": "nowhere"},
            "adapters": {"kind": "low_rank", "targets": ["query"]},
        },
        "init_from": merged(absent, adapters={"kind": "prefix"}),
        "embed_dimension": merged(absent, model__embed_dimension=1),
        "LoRA needs a pretrained model": merged(TEXTS, init_from="", objective__lora={"rank": 2}),
    }
    missed = []
    for words, config in cases.items():
        try:
            RunSpec.of(config)
        except ConfigError as error:
            if words not in str(error):
                missed.append(f"{words}: {error}")
        else:
            missed.append(f"{words}: no error")
    assert missed == []


def test_steps_follow_from_tokens_where_none_are_given():
    asked = merged(CONFIG, train__steps=0, train__batch_size=4, data__tokens=1_000.0)
    assert RunSpec.of(asked).train_options(50).steps == 5
    assert RunSpec.of(merged(asked, train__steps=7)).train_options(50).steps == 7
    for config in (merged(asked, data__tokens=0.0), merged(asked, data__tokens=1.0)):
        with pytest.raises(ConfigError, match=r"train\.steps"):
            RunSpec.of(config).train_options(50)


def test_a_model_to_start_from_is_told_the_length_that_it_can_read():
    for family, kept, grown in (("gpt2", 96, 96), ("neox", 96, 128), ("llama", 200, 200)):
        config = registry.model_config(family, {"vocab_size": 10, "max_length": kept})
        values = registry.inherited(config, {"dtype": "bfloat16", "embed_dim": 1}, 128)
        assert values["max_length"] == grown, family
        assert values == {**dataclasses.asdict(config), "max_length": grown, "dtype": "bfloat16"}
    cells = registry.model_config("sct", {"num_genes": 256})
    assert registry.inherited(cells, {}, 512) == dataclasses.asdict(cells)


def test_a_file_of_texts_is_known_by_its_content(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text("{}")
    first = resume.hashes_of({"objective.prompts": str(path)})
    path.write_text("{ }")
    assert first.keys() == {"objective.prompts"}
    assert resume.hashes_of({"objective.prompts": str(path)}) != first
    with pytest.raises(ConfigError, match=r"data\.studies"):
        resume.hashes_of({"data.studies": str(tmp_path / "absent.yaml")})


def test_runs_made_before_an_option_go_on(tmp_path):
    data = {"store": "nowhere", "features": "random"}
    config = {
        "family": "zeromics_cells", "task": "masked_bins", "model": {}, "objective": {}, "optimizer": {}, "train": {},
        "data": {**data, "genes": "", "values": "quantiles"}, "adapters": {"kind": ""},
    }  # fmt: skip
    before = {name: value for name, value in config.items() if name != "adapters"} | {"data": data}
    resume.check_options(before, RunSpec.of(config), tmp_path)
    changed = merged(config, data__values="levels")
    with pytest.raises(ConfigError, match=r"data\.values"):
        resume.check_options(before, RunSpec.of(changed), tmp_path)


def test_a_run_of_former_names_goes_on_with_the_current_ones(tmp_path):
    new = merged(CONFIG, model__stem_kernel_size=7, objective__logit_adjustment=True)
    old = merged(CONFIG, model__stem_taps=7, objective__logit_adjustment=True)
    with pytest.warns(FutureWarning, match="stem_kernel_size") as notes:
        spec = RunSpec.of(old)
    assert len(notes) == 1
    assert spec.values["model"] == spec.model == new["model"]
    with warnings.catch_warnings():  # nobody edits what a run recorded
        warnings.simplefilter("error", FutureWarning)
        resume.check_options(old, RunSpec.of(new), tmp_path)
        with pytest.raises(ConfigError, match=r"model\.stem_kernel_size = 7"):
            resume.check_options(old, RunSpec.of(merged(new, model__stem_kernel_size=5)), tmp_path)
    with pytest.raises(ConfigError, match="stem_taps and stem_kernel_size"):
        RunSpec.of(merged(new, model__stem_taps=7))


def test_former_names_of_options_are_accepted_in_every_section():
    @dataclasses.dataclass(frozen=True)
    class Part:
        width: int = dataclasses.field(default=3, metadata={"formerly": "breadth"})

    @dataclasses.dataclass(frozen=True)
    class Section:
        part: Part = Part()
        parts: Part = dataclasses.field(default_factory=Part, metadata={"formerly": "pieces"})
        size: int = 1

    with pytest.warns(FutureWarning) as notes:
        made = registry.build(
            Section, {"size": 2, "part": {"breadth": 4}, "pieces": {"breadth": 5}}, "section"
        )
    assert made == Section(Part(4), Part(5), 2)
    told = [str(note.message).split(" ")[0] for note in notes]
    assert told == ["section.part.breadth", "section.pieces", "section.parts.breadth"]
    with pytest.raises(ConfigError, match="breadth and width"):
        registry.build(Section, {"part": {"breadth": 4, "width": 4}}, "section")
