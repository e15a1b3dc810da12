"""Questions for a search: two parts without a document in common, and nothing to guess by."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundled_data import bundled
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mediphi.config.corpus import Corpus
from mediphi.config.validation import DocumentSet, Validation
from mediphi.data.choice_candidates import candidates, unknown_to
from mediphi.data.corpora import SIDES, CorpusReading, Side, read_documents, split_side
from mediphi.data.validation_sets import PARTS, ValidationSet, sets_of
from mediphi.errors import UserError
from mediphi.evaluate.multiple_choice import baselines
from mediphi.records import Document, MultipleChoice

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("la", "mi", "ron", "stu", "ven")]
KINDS = ("continuation", "summary", "question_answer")


def prose(rng: random.Random, num_words: int) -> str:
    words = [rng.choice(WORDS) for _ in range(num_words)]
    return ". ".join(" ".join(words[i : i + 8]).capitalize() for i in range(0, num_words, 8))


def page(number: int, source: str = "pages", num_words: int = 120) -> Document:
    rng = random.Random(f"{source}{number}")
    answers = [[f"What is part {n} of it?", prose(rng, 12 + 3 * n)] for n in range(3)]
    return Document(
        id=f"{source}/{number}",
        group_id=f"{source}/{number // 2}",
        source=source,
        text=prose(rng, num_words),
        title=f"Xylo {number}",
        facts={"summary": prose(rng, rng.randint(8, 30)), "questions": answers},
    )


PAGES = [page(n) for n in range(60)] + [page(n, "notes") for n in range(60)]


def validation(*kinds: str, sources: Iterable[str] = ("pages", "notes"), **keys: Any) -> Validation:
    one = {"sources": list(sources), "prompt_words": 20, "option_words": 10}
    sets = {kind: {"kind": kind, **one} for kind in kinds}
    return Validation.model_validate({"sets": sets, "min_questions": 1, **keys})


def made(
    documents: Iterable[Document] = PAGES,
    *kinds: str,
    training: Iterable[Document] = (),
    seed: int = 0,
    guarded: Iterable[str] = (),
    **keys: Any,
) -> list[ValidationSet]:
    sides: dict[Side, list[Document]] = {"heldout": list(documents), "train": list(training)}
    config = validation(*(kinds or KINDS), **keys)
    return sets_of(config, sides.__getitem__, guarded=set(guarded), seed=seed)


def questions(sets: Iterable[ValidationSet]) -> list[MultipleChoice]:
    return [question for one in sets for part in PARTS for question in getattr(one, part)]


def right(question: MultipleChoice) -> str:
    return question.options[question.answer]


def document_of(question: MultipleChoice) -> Document:
    by_id = {document.id: document for document in PAGES}
    return by_id[question.id.rpartition("/")[0]]


@settings(deadline=None, max_examples=10)
@given(st.randoms(use_true_random=False))
def test_the_order_of_documents_decides_nothing(rng: random.Random) -> None:
    shuffled = rng.sample(PAGES, len(PAGES))
    assert made(shuffled) == made()


def test_the_seed_decides() -> None:
    assert made(seed=0) == made(seed=0)
    for one, other in zip(made(seed=0), made(seed=1), strict=True):
        assert one.fingerprint != other.fingerprint


def test_no_group_is_in_both_parts_of_any_set() -> None:
    groups: dict[str, set[str]] = {part: set() for part in PARTS}
    for one in made(num_questions=10_000):
        for part in PARTS:
            own = getattr(one, part)
            assert own and {question.group for question in own} == {one.name}
            groups[part] |= {document_of(question).group_id for question in own}
    assert groups["search"].isdisjoint(groups["holdout"])


def test_wrong_options_come_from_the_same_part_and_source_and_another_group() -> None:
    for one in made(PAGES, "continuation", num_questions=10_000):
        for part in PARTS:
            asked = getattr(one, part)
            owner = {right(question): document_of(question) for question in asked}
            for question in asked:
                own = document_of(question)
                for option in set(question.options) - {right(question)}:
                    assert owner[option].source == own.source
                    assert owner[option].group_id != own.group_id


def test_the_share_of_groups_that_is_held_out_is_the_one_asked_for() -> None:
    [one] = made([page(n) for n in range(2000)], "summary", holdout_share=0.2, num_questions=10_000)
    share = len(one.holdout) / len(one.search + one.holdout)
    assert share == pytest.approx(0.2, abs=0.05)  # four standard deviations of 1,000 groups


def test_options_are_distinct_and_the_right_one_does_not_stand_in_the_prompt() -> None:
    for question in questions(made(num_questions=10_000)):
        assert len({option.casefold() for option in question.options}) == 4
        assert right(question) not in question.prompt


def test_each_place_is_right_equally_often() -> None:
    for one in made(num_questions=41):
        for part in PARTS:
            places = Counter(question.answer for question in getattr(one, part))
            assert max(places.values()) - min(places[n] for n in range(4)) <= 1


def test_a_set_has_as_many_questions_as_asked_for_and_about_as_many_documents() -> None:
    [one] = made([page(n, num_words=400) for n in range(60)], "continuation", num_questions=20)
    assert len(one.search) == len(one.holdout) == 20
    assert len({document_of_id(q.id) for q in one.search}) == 20


def document_of_id(name: str) -> str:
    return name.rpartition("/")[0]


def test_a_continuation_goes_on_in_the_text() -> None:
    [one] = made(PAGES, "continuation")
    for question in questions([one]):
        text = document_of(question).text
        assert f"{question.prompt} {right(question)}" in text
        assert len(right(question).split()) == 10
        assert 20 <= len(question.prompt.split()) <= 40
        assert question.prompt.endswith(".") and right(question)[0].isupper()


def test_an_answer_names_no_word_of_the_topic() -> None:
    told = page(0)
    facts = {"questions": [["What is it?", f"Zincum is {prose(random.Random(0), 7)}. " * 2]]}
    other = [["How is it seen?", f"The ZINCUM shines so and {told.text}"]]
    named = replace(told, title="Zincum (a metal)", facts=facts)
    one = DocumentSet(kind="question_answer", sources=("pages",), option_words=8)
    assert list(candidates([named], one)) == []
    [found] = candidates([replace(named, facts={"questions": other})], one)
    assert found.prompt == "Question: How is it seen?\nAnswer:"
    assert "zincum" not in found.right.casefold() and found.right in told.text


def test_what_stands_in_training_texts_is_not_asked() -> None:
    options = [prose(random.Random(n), 16) for n in range(600)]
    quoted = replace(page(1), text=f"Before. {options[5].upper()} and after.")
    half = replace(page(2), text=" ".join(options[7].split()[:8]))
    summed = replace(page(3), facts={"summary": options[9]})
    fresh = unknown_to([quoted, half, summed], options)
    assert [n for n, is_fresh in enumerate(fresh) if not is_fresh] == [5, 9]
    copies = [replace(document, id=f"x/{n}") for n, document in enumerate(PAGES[:40])]
    sets = made(PAGES, "continuation", "summary", training=copies)
    asked = {document_of(question).id for question in questions(sets)}
    assert asked and asked.isdisjoint(document.id for document in PAGES[:40])


def test_a_guarded_source_keeps_its_ids_and_groups_to_itself() -> None:
    plain, hidden = made(), made(guarded=["notes"])
    for one, other in zip(questions(plain), questions(hidden), strict=True):
        if document_of(one).source == "notes":
            assert "notes" not in other.id and len(other.id) == 16
            assert other == replace(one, id=other.id)
        else:
            assert one == other
        assert one.cluster is not None and len(one.cluster) == 16


def test_a_set_that_is_too_small_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as told:
        made(PAGES, "summary", min_questions=500)
    assert str(told.value).startswith("validation.sets.summary: ")
    assert "min_questions=500" in str(told.value) and "\n" not in str(told.value)


def test_codes_are_asked_of_training_documents_and_split_by_group() -> None:
    codes = bundled("icd10cm", levels=("category",))
    config = Validation.model_validate(
        {"num_questions": 50, "sets": {"c": {"kind": "codes", "sources": ["icd10cm"]}}}
    )
    sides: dict[Side, list[Document]] = {"heldout": [], "train": list(codes)}
    [one] = sets_of(config, sides.__getitem__, guarded=set(), seed=0)
    described = {document.facts["code"]: document.facts["description"] for document in codes}
    assert len(one.search) == len(one.holdout) == 50
    for question in questions([one]):
        assert right(question) == described[question.id.split("/")[1]]
        assert question.group == "c"
    asked = [{question.id for question in getattr(one, part)} for part in PARTS]
    assert asked[0].isdisjoint(asked[1])
    shuffled = random.Random(0).sample(codes, len(codes))
    sides["train"] = shuffled
    assert sets_of(config, sides.__getitem__, guarded=set(), seed=0) == [one]


def rows(folder: Path, count: int, **keys: Any) -> Validation:
    path = folder / "q.jsonl"
    made_rows = [
        {"prompt": f"P{n}", "options": ["a", "b", "c"], "answer": n % 3, "group": n // 2, **keys}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made_rows))
    licence = {"id": "x", "origin": "x", "commercial_ok": True}
    one = {"kind": "file", "path": str(path), "licence": licence}
    return Validation.model_validate({"sets": {"mine": one}})


def test_rows_of_a_file_are_split_by_group_or_as_they_say(tmp_path: Path) -> None:
    [one] = sets_of(rows(tmp_path, 120), lambda _: (), guarded=set(), seed=0)
    clusters = [{question.cluster for question in getattr(one, part)} for part in PARTS]
    assert clusters[0].isdisjoint(clusters[1])
    assert len(one.search) + len(one.holdout) == 120
    with pytest.raises(UserError, match="0 questions in the holdout part"):
        sets_of(rows(tmp_path, 120, split="search"), lambda _: (), guarded=set(), seed=0)


@pytest.mark.parametrize(
    ("kind", "source", "keys"),
    [
        ("continuation", "mtsamples", {}),
        ("continuation", "pubmedqa", {}),
        ("question_answer", "medquad", {"collections": ("2_GARD_QA",)}),
        ("summary", "mtsamples", {}),
    ],
)
def test_rules_that_know_nothing_are_at_chance_on_the_bundled_corpora(
    kind: str, source: str, keys: dict[str, Any]
) -> None:
    """First, longest and shortest option, on as many questions as there are."""
    documents = bundled(source, **keys)
    heldout = [d for d in documents if split_side(d.group_id, 0.2) == "heldout"]
    one = {"kind": kind, "sources": [source]}
    config = Validation.model_validate({"sets": {"s": one}, "num_questions": 200})
    sides: dict[Side, list[Document]] = {"heldout": heldout, "train": []}
    [found] = sets_of(config, sides.__getitem__, guarded=set(), seed=0)
    own = questions([found])
    assert len(own) >= 60
    told = baselines(own)
    spread = 4 * (0.25 * 0.75 / len(own)) ** 0.5
    assert told["chance"] == pytest.approx(0.25)
    assert told["first"] == pytest.approx(0.25, abs=0.02)
    for rule in ("longest", "shortest"):
        assert told[rule] == pytest.approx(0.25, abs=spread), rule


@pytest.fixture(scope="module")
def datamix() -> Iterator[CorpusReading]:
    root = Path(__file__).resolve().parents[2]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        composed = compose("config", overrides=["corpus=datamix"])
    composed.paths.assets = str(root / "assets")
    corpus = Corpus.model_validate(OmegaConf.to_container(composed, resolve=True)["corpus"])
    with read_documents(corpus) as reading:
        yield reading


def test_the_default_sets_are_held_out_and_large_enough(datamix: CorpusReading) -> None:
    """Of the codes, which are asked of training documents, only the parts are apart."""
    path = Path(__file__).resolve().parents[2] / "conf" / "validation" / "search.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    content = {key: own for key, own in content.items() if key not in ("defaults", "corpus")}
    config = Validation.model_validate(content)
    sides: dict[Side, list[Document]] = {side: list(datamix.records(side)) for side in SIDES}  # type: ignore[misc]
    sets = sets_of(config, sides.__getitem__, guarded=set(), seed=0)
    groups = {side: {d.id: d.group_id for d in own} for side, own in sides.items()}
    assert set(groups["train"].values()).isdisjoint(groups["heldout"].values())
    for one in sets:
        told = baselines(questions([one]))
        spread = 3 * (0.25 * 0.75 / len(questions([one]))) ** 0.5
        for rule in ("first", "longest", "shortest"):
            assert told[rule] == pytest.approx(0.25, abs=spread), (one.name, rule)
        assert min(len(one.search), len(one.holdout)) >= config.min_questions
        assert {q.cluster for q in one.search}.isdisjoint({q.cluster for q in one.holdout})
        if one.name == "codes":
            continue
        asked = {document_of_id(question.id) for question in questions([one])}
        assert asked <= groups["heldout"].keys() and asked.isdisjoint(groups["train"])
    own = [right(q) for one in sets if one.name != "codes" for q in questions([one])]
    assert all(unknown_to(sides["train"], own))
