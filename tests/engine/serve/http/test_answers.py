"""lm-evaluation-harness as its users run it: `local-completions` over the server agrees with its own `hf` back-end.

One tiny Llama with random weights, in float32 on both sides. Tasks and data are written by the test.
"""

import json

import pytest

from anabranch import LLM
from anabranch.models.weights import save_model
from anabranch.train.tokenizer import write_tokenizer

CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
WRITING = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "x"
generation_kwargs: {{until: ["\\x01"], max_gen_toks: 8, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""
ITEMS = [
    {"question": "What flows?", "choices": ["a river", "stone", "naïveté – 日本"], "answer": 0},
    {"question": "1 + 1 =", "choices": ["two", "11", "3", "2"], "answer": 3},
    {"question": "import", "choices": ["os", "sys", "re, json"], "answer": 2},
    {"question": "x" * 150, "choices": ["y", "yes " * 20], "answer": 0},
]


@pytest.fixture(scope="module")
def llama(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    heads = {"q_heads": 4, "k_heads": 2, "v_heads": 2, "k_dim": 8, "v_dim": 8}
    save_model(build(family="llama", vocab_size=258, eos_ids=(257,), **heads), path)
    write_tokenizer(path, context=512)
    return path


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """`evaluate(model, arguments)`: samples of both tasks by task and item."""
    import lm_eval  # takes seconds
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, task in (("choose", CHOICE), ("write", WRITING)):
        (folder / f"{name}.yaml").write_text(task.format(data=data, cache=folder / "cache"))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model, arguments, **options):
        found = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["choose", "write"],
            task_manager=tasks,
            bootstrap_iters=0,
            **options,
        )
        return found["samples"], found["results"]

    return run


def texts(samples):
    """Outputs, without an unfinished character at the end: the server waits for the rest of it."""
    return [one["resps"][0][0].rstrip("\ufffd") for one in samples]


@pytest.mark.slow
def test_local_completions_equals_the_harness_own_back_end(llama, serve, evaluate):
    server = serve(LLM(llama, max_num_seqs=8))
    served, scores = evaluate(
        "local-completions",
        {"model": "tiny", "base_url": f"{server.url}/v1/completions", "num_concurrent": 3, "max_length": 512},
        batch_size=4,
    )
    local, local_scores = evaluate("hf", {"pretrained": str(llama), "dtype": "float32"}, device="cpu", batch_size=1)
    assert len(served["choose"]) == len(ITEMS)
    for ours, theirs in zip(served["choose"], local["choose"], strict=True):
        assert ours["doc"] == theirs["doc"]
        got, wanted = ([answer for (answer,) in one["resps"]] for one in (ours, theirs))
        assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-3)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert texts(served["write"]) == texts(local["write"])
    assert scores["choose"]["acc,none"] == local_scores["choose"]["acc,none"]
