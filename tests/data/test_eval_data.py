"""Loaders: every form by a record written out by hand, the real files by their counts, bad records by name."""

import json
from collections import Counter

import pytest

from kedit.data import FORMATS, load_cases
from kedit.edit import Edit
from kedit.errors import EditError, UnknownNameError
from kedit.evaluation.cases import EditCase, Kind, Probe

REWRITE = {
    "prompt": "The mother tongue of {} is",
    "subject": "Danielle Darrieux",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French", "id": "Q150"},
}
RECORDS = {
    "counterfact": {
        "case_id": 7,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["Michel Rocard is a native speaker of"],
        "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
        "generation_prompts": ["Danielle Darrieux was born in"],
    },
    "counterfact-flat": {
        "case_id": 7,
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "ground_truth": "French",
        "rephrase_prompt": "Danielle Darrieux, a native",
        "locality_prompt": "Michel Rocard is a native speaker of",
        "locality_ground_truth": "French",
    },
    "sadr": {
        "requested_rewrite": {
            "prompt": "The mother tongue of Danielle Darrieux is",
            "subject": "Danielle Darrieux",
            "target_new": "English",
            "target_true": "French",
        },
        "rewrite": {"prompts": ["The mother tongue of Danielle Darrieux is"], "targets": ["English"]},
        "p-paraphrase": {"prompts": ["Danielle Darrieux, a native"], "targets": ["English"]},
        "p-subject_alias": {"prompts": ["The mother tongue of D. D. is"], "targets": ["English"]},
        "p-reasoning": {"prompts": ["Danielle Darrieux writes from"], "targets": ["left to right"]},
        "l-neighbor": {"prompts": ["Michel Rocard is a native speaker of"], "targets": ["French"]},
        "l-relation": {"prompts": ["The occupation of Danielle Darrieux is"], "targets": ["actor"]},
        "o-commonsense": {"prompts": "How to open a door?", "right": "By its handle.", "wrong": "By its hinge."},
        "generation": [],
    },
    "zsre": {
        "src": "What is the mother tongue of Danielle Darrieux?",
        "subject": "Danielle Darrieux",
        "alt": "English",
        "answers": ["French", "français"],
        "rephrase": "Which language did Danielle Darrieux grow up with?",
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
    },
    "knowedit": {
        "prompt": "What is the mother tongue of Danielle Darrieux?",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "ground_truth": [["French"]],
        "rephrase_prompt": "Which language did Danielle Darrieux grow up with?",
        "locality": {
            "Relation_Specificity": [{"prompt": "Danielle Darrieux worked as an", "ground_truth": [["actor", "actress"]]}],
            "Forgetfulness": [{"prompt": "Danielle Darrieux also spoke", "ground_truth": []}],
        },
        "portability": {
            "Reasoning": [{"prompt": "Danielle Darrieux writes from", "ground_truth": "left to right"}],
            "Subject_Aliasing": [{"prompt": "The mother tongue of D. D. is", "ground_truth": ["English"]}],
        },
    },
    "mquake": {
        "case_id": 7,
        "requested_rewrite": [
            {**REWRITE, "question": "What is the mother tongue of Danielle Darrieux?"},
            {**REWRITE, "prompt": "{} comes from", "subject": "English", "question": "Where does English come from?",
             "target_new": {"str": "Peru"}, "target_true": {"str": "England"}},
        ],
        "questions": ["Where does the mother tongue of Danielle Darrieux come from?"],
        "answer": "France", "answer_alias": [], "new_answer": "Peru", "new_answer_alias": ["Republic of Peru"],
        "single_hops": [],
        "new_single_hops": [
            {"question": "What is the mother tongue of Danielle Darrieux?", "answer": "English", "answer_alias": []},
            {"question": "What is the capital of Peru?", "answer": "Lima", "answer_alias": []},
        ],
    },
    "ripple": {
        "example_type": "popular",
        "edit": {
            "prompt": "The name of the country of citizenship of Duke of Wellington is Syria.",
            "subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q2",
            "original_fact": {"prompt": "The name of the country of citizenship of Duke of Wellington is Ireland."},
        },
        "Relation_Specificity": [
            {"test_queries": [{"prompt": "The occupation of Duke of Wellington is",
                               "answers": [{"value": "soldier", "aliases": ["military officer"]}]}]},
            {"test_queries": [{"prompt": "The name of the child of Duke of Wellington is", "answers": [{"value": ""}]}]},
        ],
        "Logical_Generalization": [
            {"test_queries": [{"prompt": "The capital of the country of Duke of Wellington is",
                               "answers": [{"value": "Damascus", "aliases": []}]}]},
        ],
        "Subject_Aliasing": [],
        "Compositionality_I": [],
        "Compositionality_II": [],
        "Forgetfulness": [],
    },
    "edits": {
        "id": "7",
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": {"str": "English"},
        "target_true": {"str": "French"},
        "paraphrases": ["{}, a native", "Danielle Darrieux grew up with"],
        "relation_id": "P103",
    },
    "known": {
        "known_id": 7,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "template": "{} is located in the continent",
        "prediction": " of Antarctica. It is the largest",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    },
    "kedit": {
        "id": "7",
        "edit": {"prompt": "{} speaks", "subject": "Ada", "target_new": "English", "target_true": "French"},
        "probes": [{"kind": "neighbour", "prompt": "Rocard speaks", "right": "French", "wrong": "English"}],
    },
}  # fmt: skip
KINDS = {
    "counterfact": {"rewrite": 1, "paraphrase": 1, "neighbour": 1, "distracted_neighbour": 1, "generation": 1},
    "counterfact-flat": {"rewrite": 1, "paraphrase": 1, "neighbour": 1, "distracted_neighbour": 1},
    "sadr": {
        "rewrite": 1, "paraphrase": 1, "alias": 1, "reasoning": 1, "neighbour": 1, "distracted_neighbour": 1,
        "relation": 1, "commonsense": 1,
    },
    "zsre": {"rewrite": 1, "paraphrase": 1, "neighbour": 1, "distracted_neighbour": 1},
    "knowedit": {"rewrite": 1, "paraphrase": 1, "relation": 1, "reasoning": 1, "alias": 1},
    "mquake": {"rewrite": 1, "paraphrase": 1, "reasoning": 1, "neighbour": 1, "distracted_neighbour": 1},
    "ripple": {"rewrite": 1, "relation": 1, "reasoning": 1},
    "edits": {"rewrite": 1, "paraphrase": 2},
    "known": {"rewrite": 1},
    "kedit": {"rewrite": 1, "neighbour": 1, "distracted_neighbour": 1},
}  # fmt: skip


def one(tmp_path, form, record=None, **options):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([record or RECORDS[form]]))
    return load_cases(path, **options)


def of_kind(case: EditCase, kind: Kind) -> Probe:
    return next(probe for probe in case.probes if probe.kind is kind)


@pytest.mark.parametrize("form", sorted(RECORDS))
def test_each_form_is_recognised_and_read(tmp_path, form):
    loaded = one(tmp_path, form)
    assert loaded.format == form
    assert not loaded.malformed
    (case,) = loaded.cases
    assert Counter(str(probe.kind) for probe in case.probes) == KINDS[form]
    assert case.edit.prompt.count("{}") == 1
    assert case == one(tmp_path, form, format=form).cases[0]


@pytest.mark.parametrize("limit", [-1, 0, 1.0, True, "3"])
def test_a_limit_is_a_whole_number_above_zero(tmp_path, limit):
    with pytest.raises(EditError, match="limit must be a whole number of at least 1"):
        one(tmp_path, "zsre", limit=limit)


def test_other_line_ends_inside_a_text_end_no_record(tmp_path):
    path = tmp_path / "cases.jsonl"
    edit = {"prompt": "{} lives\u2028in\x85the", "subject": "Ada", "target_new": "North"}
    record = json.dumps({"id": "a", "edit": edit}, ensure_ascii=False)
    other = json.dumps({"id": "b", "edit": edit}, ensure_ascii=False)
    path.write_text(f"\ufeff{record}\r\n{other}\n", encoding="utf-8")
    loaded = load_cases(path)
    assert [case.id for case in loaded.cases] == ["a", "b"]
    assert not loaded.malformed
    assert loaded.cases[0].edit.prompt == edit["prompt"]


def test_every_form_has_a_record_here():
    assert set(FORMATS) == set(RECORDS)


@pytest.mark.parametrize("form", ["counterfact", "counterfact-flat", "sadr"])
def test_counterfacts_sides(tmp_path, form):
    case = one(tmp_path, form).cases[0]
    assert case.edit == Edit("The mother tongue of {} is", "Danielle Darrieux", "English", "French")
    assert (of_kind(case, Kind.PARAPHRASE).right, of_kind(case, Kind.PARAPHRASE).wrong) == ("English", "French")
    assert (of_kind(case, Kind.NEIGHBOUR).right, of_kind(case, Kind.NEIGHBOUR).wrong) == ("French", "English")
    assert of_kind(case, Kind.DISTRACTED).prompt == (
        "The mother tongue of Danielle Darrieux is English. Michel Rocard is a native speaker of"
    )


def test_sadrs_relations_are_against_the_edits_target(tmp_path):
    case = one(tmp_path, "sadr").cases[0]
    relation = of_kind(case, Kind.RELATION)
    assert (relation.right, relation.wrong) == ("actor", "English")
    assert of_kind(case, Kind.COMMONSENSE).wrong == "By its hinge."


def test_mends_locality_question_has_no_wrong_answer(tmp_path):
    case = one(tmp_path, "zsre").cases[0]
    assert case.edit.prompt == "What is the mother tongue of {}?"
    assert case.edit.target_true == "French"
    neighbour = of_kind(case, Kind.NEIGHBOUR)
    assert neighbour.prompt == "who played desmond doss father in hacksaw ridge?"
    assert (neighbour.right, neighbour.wrong) == ("Hugo Weaving", None)


def test_knowedits_nested_answers(tmp_path):
    relation = of_kind(one(tmp_path, "knowedit").cases[0], Kind.RELATION)
    assert (relation.right, relation.accept, relation.wrong) == ("actor", ("actress",), "English")


def test_mquake_writes_several_facts_and_asks_across_them(tmp_path):
    case = one(tmp_path, "mquake").cases[0]
    assert [edit.target_new for edit in case.edits] == ["English", "Peru"]
    question = of_kind(case, Kind.REASONING)
    assert (question.right, question.wrong, question.accept) == ("Peru", "France", ("Republic of Peru",))
    assert of_kind(case, Kind.NEIGHBOUR).right == "Lima"  # a hop that no rewrite touches


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The name of the mother of Duke of York is Ann C.", ("The name of the mother of {} is", "Duke of York", "Ann C")),
        ("The name of the country which Mali is associated with is Chad.",
         ("The name of the country which {} is associated with is", "Mali", "Chad")),
        ("The names of the siblings of Ada are Bob.", ("The names of the siblings of {} are", "Ada", "Bob")),
        ("The number of children Ada has is 3.", ("The number of children {} has is", "Ada", "3")),
        ("The place of birth of Ada is Rome.", ("The place of birth of {} is", "Ada", "Rome")),
        ("The name of the field of work of Ada is law.", ("The name of the field of work of {} is", "Ada", "law")),
        ("The eye color of Ada is blue.", ("The eye color of {} is", "Ada", "blue")),
        ("Dune is followed by Dune Messiah.", ("{} is followed by", "Dune", "Dune Messiah")),
    ],
)  # fmt: skip
def test_ripples_sentences_are_taken_apart(tmp_path, sentence, expected):
    record = json.loads(json.dumps(RECORDS["ripple"]))
    record["edit"] = {"prompt": sentence}
    edit = one(tmp_path, "ripple", record).cases[0].edit
    assert (edit.prompt, edit.subject, edit.target_new) == expected


def test_ripples_old_target_and_a_sentence_of_no_known_wording(tmp_path):
    case = one(tmp_path, "ripple").cases[0]
    assert case.edit == Edit(
        "The name of the country of citizenship of {} is", "Duke of Wellington", "Syria", "Ireland"
    )
    assert of_kind(case, Kind.RELATION).accept == ("military officer",)
    record = {**RECORDS["ripple"], "edit": {"prompt": "Nobody knows."}}
    with pytest.raises(EditError, match="wordings"):
        one(tmp_path, "ripple", record)


def test_bad_records_are_counted_and_named(tmp_path):
    good = RECORDS["counterfact"]
    bad = [
        {key: value for key, value in good.items() if key != "paraphrase_prompts"},
        {**good, "case_id": 8, "requested_rewrite": {**REWRITE, "subject": " "}},
        {**good, "case_id": 7},
        "not a record",
        {**good, "case_id": 9, "requested_rewrite": {**REWRITE, "target_new": {"str": "French"}}},
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([good, *bad]))
    loaded = load_cases(path)
    assert [case.id for case in loaded.cases] == ["7"]
    reasons = {item.number: item.reason for item in loaded.malformed}
    assert sorted(reasons) == [1, 2, 3, 4, 5]
    for number, words in enumerate(
        ["paraphrase_prompts", "expected text", "taken", "not a record", "right and as wrong"]
    ):
        assert words in reasons[number + 1]
        assert f"record {number + 1}: " in loaded.report()
    with pytest.raises(EditError, match="Record 1.*paraphrase_prompts"):
        load_cases(path, strict=True)


def test_json_lines_and_a_broken_line(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(RECORDS["kedit"]) + "\n\n{broken\n")
    loaded = load_cases(path)
    assert (len(loaded.cases), len(loaded.malformed)) == (1, 1)
    assert "not JSON" in loaded.malformed[0].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "no known form"), ('[{"a": 1}]', "first record has the fields a"), ("3", "list"), ("{", "not JSON")],
)
def test_files_that_hold_no_cases(tmp_path, content, message):
    path = tmp_path / "cases.json"
    path.write_text(content)
    with pytest.raises(EditError, match=message):
        load_cases(path)


def test_a_format_that_does_not_fit_and_one_that_does_not_exist(tmp_path):
    with pytest.raises(EditError, match="no case in the form 'zsre'.*subject"):
        one(tmp_path, "counterfact", format="zsre")
    with pytest.raises(UnknownNameError, match="zsre"):
        one(tmp_path, "counterfact", format="zsr")


def test_our_own_lines_read_back(tmp_path):
    case = one(tmp_path, "mquake").cases[0]
    assert one(tmp_path, "kedit", case.to_dict()).cases == [case]


@pytest.mark.parametrize(
    ("name", "form", "cases", "probes"),
    [
        ("sadr_merged_counterfact_half", "sadr", 839, {"alias": 2358, "reasoning": 2487, "relation": 1416, "commonsense": 839}),
        ("counterfact_flat_1000", "counterfact-flat", 1000, {"paraphrase": 1000, "neighbour": 1000}),
        ("counterfact_schema_100", "counterfact", 100, {"paraphrase": 181, "neighbour": 863, "generation": 342}),
        ("known_1000", "known", 1209, {}),
        ("knowedit_zsre_200", "knowedit", 200, {"paraphrase": 200, "relation": 400, "reasoning": 152, "alias": 48}),
    ],
)  # fmt: skip
def test_real_files_whole(test_data, name, form, cases, probes):
    loaded = load_cases(test_data / "datasets" / f"{name}.json", strict=True)
    assert (loaded.format, len(loaded.cases)) == (form, cases)
    found = Counter(str(probe.kind) for case in loaded.cases for probe in case.probes)
    assert found["rewrite"] == cases
    assert {kind: found[kind] for kind in probes} == probes
