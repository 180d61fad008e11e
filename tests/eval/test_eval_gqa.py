"""The GQA scores by hand on a few questions, and against a plain loop on many."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goose_mm.eval.metrics.gqa import gqa_scores, normalize_gqa_llava

PER_TYPE = (
    "accuracyPerStructuralType",
    "accuracyPerSemanticType",
    "accuracyPerLength",
    "accuracyPerSteps",
)


def question(answer="yes", **changes):
    row = {
        "question": "Is it red?",
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
        "groups": {"global": None, "local": "08-ball"},
        "entailed": [],
        "semantic": [{"operation": "select", "argument": "ball (1)", "dependencies": []}],
    }
    return row | changes


def types(structural="verify", semantic="attr", detailed="verifyAttr"):
    return {"structural": structural, "semantic": semantic, "detailed": detailed}


def of_group(answer, name):
    return question(answer, groups={"global": name, "local": None})


@pytest.mark.parametrize("prediction", ["Yes", "yes.", " yes", "yes "])
def test_only_equal_strings_are_right(prediction):
    assert gqa_scores({"1": question("yes")}, {"1": prediction})["accuracy"] == 0.0
    assert gqa_scores({"1": question("yes")}, {"1": "yes"})["accuracy"] == 100.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes"), ("Red...", "red"), ("no", "no"), ("e.g.", "e.g"), (" Yes. ", " yes. ")],
)
def test_llava_drops_final_stops_and_case(text, expected):
    assert normalize_gqa_llava(text) == expected


def test_query_is_open_and_all_else_is_binary():
    questions = {
        "1": question("red", types=types("query")),
        "2": question(types=types("verify")),
        "3": question(types=types("choose", "obj")),
        "4": question(types=types("logical")),
        "5": question(types=types("compare")),
    }
    predictions = {"1": "red", "2": "yes", "3": "yes", "4": "yes", "5": "no"}
    scores = gqa_scores(questions, predictions)
    assert scores["open"] == 100.0
    assert scores["binary"] == 75.0
    assert scores["accuracy"] == 80.0
    assert scores["accuracyPerStructuralType"] == {
        "query": (100.0, 1),
        "verify": (100.0, 1),
        "choose": (100.0, 1),
        "logical": (100.0, 1),
        "compare": (0.0, 1),
    }
    assert scores["accuracyPerSemanticType"] == {"attr": (75.0, 4), "obj": (100.0, 1)}


def test_unbalanced_questions_are_not_scored():
    questions = {"1": question(), "2": question(isBalanced=False)}
    assert gqa_scores(questions, {"1": "yes"}) == gqa_scores({"1": question()}, {"1": "yes"})
    assert gqa_scores(questions, {"1": "yes", "2": "no"})["accuracy"] == 100.0


def test_accuracy_per_number_of_words():
    questions = {"1": question(question="Is it  red?"), "2": question(question="Is that ball red?")}
    scores = gqa_scores(questions, {"1": "yes", "2": "no"})
    assert scores["accuracyPerLength"] == {3: (100.0, 1), 4: (0.0, 1)}


@pytest.mark.parametrize(
    ("operation", "argument", "counts"),
    [
        ("select", "ball (1)", 1),
        ("query", "name", 0),
        ("query", "hposition", 1),
        ("choose name", "dog|cat", 0),
        ("choose color", "red|blue", 1),
        ("exist", "?", 0),
        # The script looks for the words anywhere in "operation: argument".
        ("verify", "existing", 0),
    ],
)
def test_asking_is_not_a_step(operation, argument, counts):
    steps = [{"operation": operation, "argument": argument, "dependencies": []}]
    scores = gqa_scores({"1": question(semantic=steps)}, {"1": "yes"})
    assert scores["accuracyPerSteps"] == {counts: (100.0, 1)}


def test_validity_and_plausibility():
    questions = {"1": question("red"), "2": question("blue")}
    choices = {
        "1": {"valid": ["red", "blue"], "plausible": ["red"]},
        "2": {"valid": ["red", "blue"], "plausible": ["blue"]},
        "3": {"valid": [], "plausible": []},
    }
    scores = gqa_scores(questions, {"1": "blue", "2": "Blue"}, choices)
    assert scores["validity"] == 50.0
    assert scores["plausibility"] == 0.0


def test_common_questions_have_their_own_choices():
    common = question("color", types=types("query", "attr", "twoCommon"))
    choices = {"1": {"valid": ["red"], "plausible": ["red"]}}
    for prediction, expected in [("shape", 100.0), ("red", 0.0)]:
        scores = gqa_scores({"1": common}, {"1": prediction}, choices)
        assert scores["validity"] == scores["plausibility"] == expected


def test_consistency_is_the_accuracy_on_what_right_answers_entail():
    questions = {
        "1": question(entailed=["1", "2", "3"]),
        "2": question(isBalanced=False),
        "3": question("no"),
        "4": question(entailed=["3"]),
        "5": question(entailed=["5"]),
    }
    # 1 is right and half of what it entails too; 4 is wrong; 5 entails nothing but itself.
    predictions = {"1": "yes", "2": "yes", "3": "yes", "4": "no", "5": "yes"}
    assert gqa_scores(questions, predictions)["consistency"] == 50.0


def test_consistency_needs_the_entailed_questions_and_their_answers():
    both = {"1": question(entailed=["2"]), "2": question(isBalanced=False)}
    assert gqa_scores(both, {"1": "yes", "2": "yes"})["consistency"] == 100.0
    assert gqa_scores(both, {"1": "yes"})["consistency"] is None
    assert gqa_scores({"1": both["1"]}, {"1": "yes", "2": "yes"})["consistency"] is None


def test_distribution_by_hand():
    questions = {
        "1": of_group("red", "color"),
        "2": of_group("red", "color"),
        "3": of_group("blue", "color"),
        "4": of_group("left", "side"),
        "5": question("yes"),
    }
    # color: red 2 -> 1 gives 1/2, blue 1 -> 1 gives 0; green is no gold answer and costs nothing
    # more. side: left 1 -> 0 gives 1. (3 * 1/2 + 1 * 1) / 4 / 100; question 5 has no group.
    predictions = {"1": "red", "2": "green", "3": "blue", "4": "right", "5": "no"}
    assert gqa_scores(questions, predictions)["distribution"] == pytest.approx(0.00625)


def test_what_is_not_measured_is_none():
    scores = gqa_scores({"1": question()}, {"1": "yes"})
    unmeasured = {key for key, value in scores.items() if value is None}
    assert unmeasured == {"open", "validity", "plausibility", "consistency", "distribution"}


def test_every_balanced_question_needs_a_prediction_and_choices():
    questions = {"1": question(), "2": question(), "3": question()}
    with pytest.raises(ValueError, match=r"2 of 3 balanced questions have no predictions.*'2'"):
        gqa_scores(questions, {"1": "yes", "9": "no"})
    with pytest.raises(ValueError, match="3 of 3 balanced questions have no choices"):
        gqa_scores(questions, dict.fromkeys("123", "yes"), {})


words = st.sampled_from(["yes", "no", "red", "Red", "blue", "color"])
groups = st.fixed_dictionaries({"global": st.sampled_from([None, "a", "b"])})
rows = st.fixed_dictionaries(
    {
        "question": st.sampled_from(["is it", "is it red", "what"]),
        "answer": words,
        "isBalanced": st.booleans(),
        "types": st.fixed_dictionaries(
            {
                "structural": st.sampled_from(["query", "verify", "choose"]),
                "semantic": st.sampled_from(["obj", "attr"]),
                "detailed": st.sampled_from(["attr", "twoCommon"]),
            }
        ),
        "groups": groups,
        "entailed": st.lists(st.sampled_from("0123"), max_size=3, unique=True),
        "semantic": st.lists(
            st.fixed_dictionaries(
                {
                    "operation": st.sampled_from(["select", "query", "exist", "choose name"]),
                    "argument": st.sampled_from(["name", "dog"]),
                }
            ),
            max_size=3,
        ),
    }
)


@st.composite
def benchmarks(draw):
    questions = {str(i): draw(rows) for i in range(4)}
    predictions = {key: draw(words) for key in questions}
    choices = {
        key: {"valid": draw(st.lists(words)), "plausible": draw(st.lists(words))}
        for key in questions
    }
    return questions, predictions, choices


def plain_loop(questions, predictions, choices):
    lists = defaultdict(list)
    tables = {name: defaultdict(list) for name in PER_TYPE}
    gold, seen = defaultdict(list), defaultdict(list)
    for key, row in questions.items():
        if not row["isBalanced"]:
            continue
        said = predictions[key]
        hit = 1 if said == row["answer"] else 0
        structural = row["types"]["structural"]
        lists["accuracy"].append(hit)
        lists["open" if structural == "query" else "binary"].append(hit)
        for kind, name in [("valid", "validity"), ("plausible", "plausibility")]:
            allowed = choices[key][kind]
            if "Common" in row["types"]["detailed"]:
                allowed = ["color", "material", "shape"]
            lists[name].append(1 if said in allowed else 0)
        steps = 0
        for step in row["semantic"]:
            call = step["operation"] + ": " + step["argument"]
            if "exist" not in call and "query: name" not in call and "choose name" not in call:
                steps += 1
        labels = [structural, row["types"]["semantic"], len(row["question"].split()), steps]
        for name, label in zip(PER_TYPE, labels, strict=True):
            tables[name][label].append(hit)
        entailed = [other for other in row["entailed"] if other != key]
        if hit and entailed:
            hits = [predictions[other] == questions[other]["answer"] for other in entailed]
            lists["consistency"].append(sum(hits) / len(hits))
        group = row["groups"]["global"]
        if group is not None:
            gold[group].append(row["answer"])
            seen[group].append(said)
    names = ["accuracy", "binary", "open", "validity", "plausibility", "consistency"]
    scores = {
        name: 100 * sum(lists[name]) / len(lists[name]) if lists[name] else None for name in names
    }
    chi, total = 0.0, 0
    for group, answers in gold.items():
        off = [
            (seen[group].count(a) - answers.count(a)) ** 2 / answers.count(a) for a in {*answers}
        ]
        chi += len(answers) * sum(off)
        total += len(answers)
    scores["distribution"] = chi / total / 100 if total else None
    return scores, {
        name: {label: (100 * sum(hits) / len(hits), len(hits)) for label, hits in table.items()}
        for name, table in tables.items()
    }


@given(benchmarks())
def test_the_scores_are_those_of_a_plain_loop(benchmark):
    found = gqa_scores(*benchmark)
    scores, tables = plain_loop(*benchmark)
    assert found.keys() == scores.keys() | tables.keys()
    for name, value in scores.items():
        assert found[name] == pytest.approx(value)
    for name, table in tables.items():
        assert found[name].keys() == table.keys()
        for label, value in table.items():
            assert found[name][label] == pytest.approx(value)


@given(benchmarks(), st.permutations("0123"))
def test_questions_have_no_order_and_scores_have_bounds(benchmark, order):
    questions, predictions, choices = benchmark
    scores = gqa_scores(questions, predictions, choices)
    shuffled = gqa_scores({key: questions[key] for key in order}, predictions, choices)
    for name, value in scores.items():
        if isinstance(value, dict):
            assert sum(count for _, count in value.values()) == sum(
                row["isBalanced"] for row in questions.values()
            )
        elif value is not None:
            assert shuffled[name] == pytest.approx(value)
            assert value >= 0 and (name == "distribution" or value <= 100)


@given(benchmarks())
def test_right_answers_score_everything(benchmark):
    questions, _, choices = benchmark
    scores = gqa_scores(questions, {key: row["answer"] for key, row in questions.items()}, choices)
    for name in "accuracy", "binary", "open", "consistency":
        assert scores[name] in (None, 100.0)
    assert scores["distribution"] in (None, 0.0)
