"""Rows of text tokens: each token from its own text alone, every cell once, the same whenever it is asked for."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.loader import Loader
from sct.data.text.prompts import JOIN, TASKS, parse_labels
from sct.data.text.source import SentenceSource, Texts, read_studies, sentence_gene_names
from sct.errors import ConfigError
from tests.data.text.toy_texts import GENES, SHORT, ToyStudy, counts, options, study, tokenizer, vocabulary

BOTH = (("cell_type_to_cell", 3.0), ("cell_to_cell_type", 1.0))
laws = settings(max_examples=12, deadline=None)


def source(*studies: ToyStudy, own_begin: bool = False, **changes) -> SentenceSource:
    return SentenceSource(
        studies or (study(23), study(8, "two", seed=1)), vocabulary(), options(**changes), SHORT,
        tokenizer(own_begin),
    )  # fmt: skip


def rows(made: SentenceSource, epoch: int = 0):
    return [made.record(number, epoch) for number in range(len(made))]


def examples(made: SentenceSource, epoch: int = 0):
    """Examples of all cells, asked for at once instead of row by row."""
    return [each for texts in made.texts for each in texts.examples(0, texts.study.n_cells, epoch)]


def decoded(made: SentenceSource, row) -> list[str]:
    return [
        made.tokenizer.decode(row["input_ids"][row["segments"] == number])
        for number in range(1, row["segments"].max() + 1)
    ]


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@laws
@given(length=st.integers(8, 150), all_tokens=st.booleans(), own_begin=st.booleans(), top_k=st.integers(0, 9))
def test_texts_stand_one_behind_another_and_what_is_predicted_is_of_its_own_text(
    length, all_tokens, own_begin, top_k
):
    made = source(length=length, all_tokens=all_tokens, own_begin=own_begin, top_k=top_k, tasks=BOTH)
    writer = made.tokenizer
    for number, row in enumerate(rows(made)):
        texts, start, stop = made._place(number)
        ids, segments = np.zeros((2, length), np.int32)
        predicted, at, wanted = np.zeros(length, bool), 0, 0
        for segment, example in enumerate(texts.examples(start, stop, 0), 1):
            prompt = len(writer.begin) + len(writer.encode(example.prompt))
            whole = [*writer.begin, *writer.encode(example.prompt + JOIN + example.response), writer.eos]
            counts = np.arange(len(whole)) >= (1 if all_tokens else prompt)
            wanted += counts.sum()
            part = slice(at, at + len(whole))
            ids[part], segments[part] = whole[: length - at], segment
            predicted[part] = counts[: length - at]
            at = min(at + len(whole), length)
        for name, expected in (("input_ids", ids), ("segments", segments), ("predicted", predicted)):
            assert row[name].dtype == expected.dtype
            np.testing.assert_array_equal(row[name], expected, err_msg=name)
        assert row["cut"] == wanted - predicted.sum()
        places = np.flatnonzero(predicted)
        assert (places > 0).all()
        np.testing.assert_array_equal(segments[places], segments[places - 1], "it follows from its own text")


ONE = dataclasses.replace(
    SHORT, templates={task: templates[:1] for task, templates in SHORT.templates.items()}
)


@laws
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), length=st.integers(30, 200))
def test_every_cell_is_in_exactly_one_row_of_a_pass(sizes, length):
    # Texts of equal length, since the tokenizer knows no such letters: none is cut.
    names = ["".join(letters) for letters in itertools.product("αβγδ", repeat=4)]
    ends = np.cumsum([0, *sizes])
    studies = [
        ToyStudy(np.eye(1, GENES).repeat(size, axis=0), f"s{i}", own=names[ends[i] : ends[i + 1]])
        for i, size in enumerate(sizes)
    ]
    chosen = options(length=length, fields={"cell_type": "own"}, all_tokens=True)
    made = SentenceSource(studies, vocabulary(), chosen, ONE, tokenizer())
    assert length < 60 or made.cells_per_row > 1 or max(sizes) == 1
    assert sum(int(row["cut"]) for row in rows(made)) == 0
    expected = [f"Write a {name}. GA0" for name in names[: ends[-1]]]
    own = made.tokenizer
    found = [own.decode(own.encode(text)) for row in rows(made) for text in decoded(made, row)]
    assert found == expected
    batches = list(Loader(made, 3, shuffle=False))
    again = [
        text
        for batch in batches
        for i in np.flatnonzero(batch["example_mask"])
        for text in decoded(made, {key: value[i] for key, value in batch.items()})
    ]
    assert again == expected


def test_a_record_follows_from_number_and_epoch_alone():
    made, other = source(tasks=BOTH), pickle.loads(pickle.dumps(source(tasks=BOTH)))
    first = {(n, e): made.record(n, e) for n in range(len(made)) for e in (0, 1, 7)}
    for (number, epoch), row in reversed(first.items()):
        assert same(row, other.record(number, epoch))
        assert same(row, made.record(number, epoch))


def test_epochs_and_seeds_have_texts_of_their_own():
    drawn = [
        "\n".join(each.text for each in examples(source(tasks=BOTH, seed=seed), epoch))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    # A seed's next epoch has the order of ties of the next seed; the templates still differ.
    assert len(set(drawn)) == 6
    made = source(tasks=BOTH)
    tasks = [[each.task for each in examples(made, epoch)] for epoch in (0, 1)]
    templates = [[each.number for each in examples(made, epoch)] for epoch in (0, 1)]
    assert tasks[0] != tasks[1]
    assert templates[0] != templates[1]


def test_only_genes_of_equal_counts_change_places():
    cells = study(40)
    texts = source(cells, top_k=0).texts[0]
    words, moved = list(texts.gene_names), 0
    before = texts.sentences(0, 40, 0)
    for epoch in (1, 2):
        after = texts.sentences(0, 40, epoch)
        for row, (one, two) in enumerate(zip(before, after, strict=True)):
            values = [[cells.counts[row, words.index(word)] for word in text.split()] for text in (one, two)]
            assert sorted(one.split()) == sorted(two.split())
            assert values[0] == values[1] == sorted(values[0], reverse=True)
            moved += one != two
    assert moved > 40
    order = np.stack([np.random.default_rng(i).permutation(GENES) + 1 for i in range(40)])
    distinct = source(ToyStudy(order, "distinct", cell_type=["B"] * 40)).texts[0]
    assert distinct.sentences(0, 40, 0) == distinct.sentences(0, 40, 5)
    written = [[each.response.split() for each in texts.examples(0, 40, epoch)] for epoch in (0, 1)]
    assert [sorted(words) for words in written[0]] == [sorted(words) for words in written[1]]
    assert written[0] != written[1], "an epoch's examples have its order"


def test_a_range_of_cells_has_the_texts_of_the_whole():
    texts = source(tasks=BOTH).texts[0]
    whole = texts.examples(0, 23, 3)
    assert [
        each for start in range(0, 23, 5) for each in texts.examples(start, min(start + 5, 23), 3)
    ] == whole


def test_tasks_are_drawn_by_their_weights():
    cells = ToyStudy(np.ones((1500, GENES)), "many", cell_type=["B"] * 1500)
    weights = (("unconditional", 0.5), ("cell_type_to_cell", 3.0), ("cell_to_cell_type", 1.5))
    drawn = [each.task for each in source(cells, tasks=weights, top_k=1).texts[0].examples(0, 1500, 0)]
    for name, weight in weights:
        share = weight / 5
        assert abs(drawn.count(name) - 1500 * share) < 4.5 * (1500 * share * (1 - share)) ** 0.5, name
    alone = [each.number for each in source(cells, top_k=1).texts[0].examples(0, 1500, 0)]
    assert abs(alone.count(0) - 750) < 4.5 * (1500 / 4) ** 0.5


def test_a_cell_is_given_tasks_that_it_can_do():
    cells = study(60)
    cells.table.loc[cells.table.index[::3], "cell_type"] = None
    cells.table.loc[cells.table.index[::6], "cell_type"] = "  "
    made = source(cells, tasks=(("cell_type_to_cell", 9.0), ("unconditional", 1.0)))
    drawn = made.texts[0].examples(0, 60, 0)
    assert len(drawn) == 60
    assert {each.task for each in drawn[::3]} == {"unconditional"}
    assert "cell_type_to_cell" in {each.task for each in drawn}
    only = source(cells).texts[0].examples(0, 60, 0)
    assert len(only) == 40
    assert all("None" not in each.text and "nan" not in each.text for each in only)


def test_cells_that_say_nothing_take_no_room():
    values = counts(12)
    values[:6] = 0
    made = source(ToyStudy(values, "holes", cell_type=["B cell"] * 12), length=256)
    found = [text for row in rows(made) for text in decoded(made, row)]
    assert len(found) == 6
    empty = source(ToyStudy(np.zeros((3, GENES)), "none", cell_type=["B cell"] * 3))
    assert len(empty) == 3
    for row in rows(empty):
        assert not any(np.any(value) for value in row.values())


def test_most_rows_are_well_filled_and_little_is_cut():
    made = source(study(400), length=200, all_tokens=True)
    whole = rows(made)
    assert made.cells_per_row > 3
    assert np.mean([(row["segments"] > 0).mean() for row in whole[:-1]]) > 0.6
    predicted = sum(int(row["predicted"].sum()) for row in whole)
    assert sum(int(row["cut"]) for row in whole) < 0.01 * predicted


def test_sentences_that_are_cut_say_so():
    template = dataclasses.replace(SHORT.templates["unconditional"][0], prompt="Write the {genes}.")
    prompts = dataclasses.replace(SHORT, templates={**SHORT.templates, "unconditional": (template,)})
    values = counts(30, low=2)
    texts = Texts(
        ToyStudy(values, "cut"), vocabulary(), options(top_k=8, tasks=(("unconditional", 1.0),)), prompts
    )  # fmt: skip
    for row, example in enumerate(texts.examples(0, 30, 0)):
        number = (values[row] > 0).sum()
        assert len(example.response.split()) == min(number, 8)
        if number != 8:
            assert ("8 most highly expressed" in example.prompt) == (number > 8)


def test_texts_of_studies(tmp_path):
    path = tmp_path / "studies.yaml"
    path.write_text("one: {tissue: spleen, abstract: 'About: cells.'}\n2024: {tissue: skin}\n")
    read = read_studies(path)
    assert read == {"one": {"tissue": "spleen", "abstract": "About: cells."}, "2024": {"tissue": "skin"}}
    first, second = study(9), study(5, "2024", seed=2)
    del second.table["tissue"]
    first.table.loc[first.table.index[:2], "tissue"] = None
    made = source(first, second, studies=read, fields={"tissue": "tissue"}, tasks=(("tissue_to_cell", 1.0),))
    found = [re.findall(r"From (\w+):", each.prompt)[0] for each in examples(made)]
    assert found == ["spleen", "spleen", *first.table["tissue"].iloc[2:], *["skin"] * 5], (
        "a cell's own comes first"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- one\n", "form"),
        ("one: spleen\n", "form"),
        ("one: {tissue: 3}\n", "form"),
        ("one: {tissue: ' '}\n", "form"),
        ("one: {tissue: [\n", "cannot be read"),
    ],
)
def test_studies_that_cannot_be_read(tmp_path, text, words):
    (tmp_path / "studies.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_studies(tmp_path / "studies.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_studies(tmp_path / "none.yaml")


def test_a_task_without_its_column_is_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'cell_type_to_cell' .*cell_type, own, tissue"):
        source(fields={"cell_type": "celltype"})
    with pytest.raises(ConfigError, match=r"'tissue_to_cell' .*tissue"):
        source(tasks=(("cell_type_to_cell", 1.0), ("tissue_to_cell", 1.0)))
    with pytest.raises(ConfigError, match=r"'labels_to_cell' .*labels"):
        source(labels=("cell_type", "dose"), tasks=(("labels_to_cell", 1.0),))


def test_labels_of_several_columns_are_told_together():
    made = source(labels=("tissue", "cell_type"), tasks=(("cell_to_labels", 1.0),))
    told = [parse_labels(each.response.rstrip(".")) for each in examples(made)]
    table = made.texts[0].obs
    assert told[:23] == table[["tissue", "cell_type"]].to_dict("records")


def test_labels_of_which_a_study_lacks_one_are_not_told():
    whole, part = study(9), study(7, "two", seed=1)
    del part.table["tissue"]
    made = source(whole, part, labels=("tissue", "cell_type"), tasks=(("cell_to_labels", 1.0),))
    assert len(examples(made)) == 9, "a part of the labels is another question"


def test_labels_that_no_study_has_together_are_missing():
    first, second = study(9), study(7, "two", seed=1)
    del first.table["tissue"], second.table["cell_type"]
    with pytest.raises(ConfigError, match=r"'cell_to_labels' .*labels"):
        source(first, second, labels=("tissue", "cell_type"), tasks=(("cell_to_labels", 1.0),))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_read_disjoint_shares_that_make_up_the_whole(processes):
    made = source(study(61), fields={"cell_type": "own"}, length=60, top_k=2, all_tokens=True)
    batches = len(made) // 6
    shares = []
    for index in range(processes):
        loader = Loader(made, 6, seed=3, process_index=index, process_count=processes)
        shares.append(list(itertools.islice(loader, batches)))
    whole = list(itertools.islice(Loader(made, 6, seed=3), batches))
    for number, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[number][key] for share in shares]), value)
    texts = [
        [text for batch in share for ids, of in zip(batch["input_ids"], batch["segments"], strict=True)
         for text in decoded(made, {"input_ids": ids, "segments": of})]
        for share in shares
    ]  # fmt: skip
    for one, two in itertools.combinations(texts, 2):
        assert not set(one) & set(two)


def test_a_text_begins_with_the_token_for_it_unless_that_ends_texts():
    assert tokenizer().bos == tokenizer().eos
    assert not len(tokenizer().begin)
    own = tokenizer(own_begin=True)
    assert own.begin.tolist() == [own.bos] == [own.token_to_id("<s>")]
    for row in rows(source(own_begin=True, length=200)):
        starts = np.flatnonzero(np.diff(row["segments"], prepend=0) > 0)
        assert len(starts) > 1
        assert (row["input_ids"][starts] == own.bos).all()
        assert not row["predicted"][starts].any()


def test_records_are_named():
    made = source(length=60, top_k=2)
    assert made.cells_per_row > 1
    assert made.describe(0) == f"cells 0 to {made.cells_per_row - 1} of study 'one'"
    assert made.describe(len(made) - 1).endswith("7 of study 'two'")


def test_words_are_symbols_where_these_name_one_gene():
    ids = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003", "ENSG00000000004"]
    genes = GeneVocabulary.from_ids(ids, ["A1", "B", "A1", "C D"], name="words")
    assert sentence_gene_names(genes) == (ids[0], "B", ids[2], ids[3])
    human = sentence_gene_names(GeneVocabulary.human())
    assert len(set(human)) == len(human) == len(GeneVocabulary.human())
    assert all(word.split() == [word] for word in human)
    assert sum(not word.startswith("ENSG") for word in human) > 19_000


def test_every_task_can_be_written_with_the_built_in_templates():
    from sct.data.text.prompts import load_prompts

    fields = {"cell_type": "cell_type", "tissue": "tissue", "abstract": "own"}
    texts = Texts(
        study(9), vocabulary(), options(fields=fields, labels=("tissue", "cell_type"),
                                        tasks=tuple((task, 1.0) for task in TASKS)), load_prompts(),
    )  # fmt: skip
    drawn = [each for epoch in range(20) for each in texts.examples(0, 9, epoch)]
    assert {each.task for each in drawn} == set(TASKS)
    assert len(drawn) == 180
