"""Data sets of the full benchmark as folders in the layout of the hub, a few rows each, with the columns of the real ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

SETS: dict[str, tuple[str, list[dict]]] = {
    "MathArena/aime_2025": (
        "data/train-00000-of-00001.parquet",
        [{"problem_idx": n, "problem": f"Find x{n}.", "answer": 70, "problem_type": ["Algebra"]} for n in (1, 2)],
    ),
    "MathArena/hmmt_feb_2026": (
        "data/train-00000-of-00001.parquet",
        [{"problem_idx": 1, "problem": "Find y.", "answer": "$\\sqrt{2}$", "problem_type": ["Geometry"]}],
    ),
    "allenai/sciq": (
        "data/test-00000-of-00001.parquet",
        [
            {"question": f"{q}?", "distractor3": "c", "distractor1": "a", "distractor2": "b", "correct_answer": "d", "support": support}
            for q, support in (("What", ""), ("Which", "Because of it."), ("Why", "  "))
        ],
    ),
    "GBaker/MedQA-USMLE-4-options-hf": (
        "data/test.jsonl",
        [
            {"id": "test-00000", "sent1": "A patient.", "sent2": "", "label": 2}
            | {f"ending{place}": ending for place, ending in enumerate("pqrs")}
        ],
    ),
    "qiaojin/pubmed_qa": (
        "pqa_labeled/train-00000-of-00001.parquet",
        [
            {
                "pubid": 21645374,
                "question": "Do they?",
                "context": {"contexts": ["One.", "Two."], "labels": ["A", "B"], "meshes": ["M"], "reasoning_required_pred": ["y"]},
                "long_answer": "They do.",
                "final_decision": "yes",
            }
        ],
    ),
    "nguha/legalbench": (
        "hearsay/test/0000.parquet",
        [{"answer": "Yes", "index": "0", "slice": "Standard hearsay", "text": "On the issue of"}],
    ),
    "yale-nlp/FinanceMath": (
        "data/validation-00000-of-00001.parquet",
        [
            {
                "question_id": "validation-0",
                "question": "How much?",
                "tables": ["| a | b |", "| 1 | 2 |"],
                "python_solution": "def solution(): ...",
                "ground_truth": 3.5,
                "topic": "t",
            }
        ],
    ),
    "lighteval/code_generation_lite": (
        "v4_v5/test-00000-of-00001.parquet",
        [
            {
                "question_title": "t",
                "question_content": "Write a program.",
                "platform": "atcoder",
                "question_id": "1_A",
                "contest_id": "1",
                "contest_date": "2025-01-01",
                "starter_code": "",
                "difficulty": "easy",
                "public_test_cases": "[]",
                "private_test_cases": "never read",
                "metadata": "{}",
            }
        ],
    ),
    "openai/openai_humaneval": (
        "openai_humaneval/test-00000-of-00001.parquet",
        [
            {
                "task_id": "HumanEval/0",
                "prompt": "def f():\n",
                "canonical_solution": "    return 1\n",
                "test": "assert f()",
                "entry_point": "f",
            }
        ],
    ),
    "google-research-datasets/mbpp": (
        "full/test-00000-of-00001.parquet",
        [
            {
                "task_id": 11,
                "text": "Remove it.",
                "code": "def g(): ...",
                "test_list": ["assert g()"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
        ],
    ),
    "SWE-bench/SWE-bench_Verified": (
        "data/test-00000-of-00001.parquet",
        [{"repo": "a/b", "instance_id": "a__b-1", "base_commit": "0", "patch": "diff", "test_patch": "", "problem_statement": "It fails."}],
    ),
    "cais/hle": (
        "data/test-00000-of-00001.parquet",
        [
            {"id": f"h{n}", "question": "Who?", "image": image, "image_preview": None, "answer": "I", "category": "Humanities"}
            for n, image in ((1, ""), (2, "data:image/png"))
        ],
    ),
    "cais/mmlu": (
        "all/test-00000-of-00001.parquet",
        [{"question": "Where?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}],
    ),
}

CONFIGS = {
    "qiaojin/pubmed_qa": "pqa_labeled",
    "lighteval/code_generation_lite": "v4_v5",
    "google-research-datasets/mbpp": "full",
    "cais/mmlu": "all",
}


def write_hub(root: Path) -> Path:
    """The data sets as folders ``owner/name``; those with configs have the card that names them."""
    for name, (file, rows) in SETS.items():
        path = root / name / file
        path.parent.mkdir(parents=True)
        if path.suffix == ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        else:
            pd.DataFrame(rows).to_json(path, orient="records", lines=True)
        if config := CONFIGS.get(name):
            split = path.name.partition("-")[0]
            card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {file}\n---\n"
            (root / name / "README.md").write_text(card, "utf-8")
    other = root / "nguha/legalbench/contract_nli_no_licensing/test/0000.parquet"
    other.parent.mkdir(parents=True)
    pd.DataFrame([{"answer": "No", "index": "0", "document_name": "d", "text": "No licence is granted."}]).to_parquet(other)
    return root
