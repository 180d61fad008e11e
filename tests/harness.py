"""Small tasks for lm-evaluation-harness, with local data, and a mark for tests that need it."""

import json
import os
from importlib.util import find_spec

import pytest

CI = "CI" in os.environ  # which installs the harnesses
lm_eval = pytest.mark.skipif(
    not (CI or find_spec("lm_eval")), reason="lm_eval is not installed: pip install lm_eval==0.4.13"
)
QUESTIONS = ["What is this?", "How many are there?", "Is there a red ball?"]


def text_tasks(folder):
    """Three tasks, one of every kind of request, on one file."""
    rows = [
        {"question": question, "choices": ["one", "two", "a red ball"], "answer": i}
        for i, question in enumerate(QUESTIONS)
    ]
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
    tasks = {
        "goose_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
        "goose_write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 7, do_sample: false}
metric_list: [{metric: exact_match}]
""",
        "goose_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    }
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{common}{text}")
    return list(tasks)
