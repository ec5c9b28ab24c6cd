import subprocess
import sys

import pytest

from anabranch.serve.request import SamplingParams


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a number from 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -2}, "top_k must be at least 1, or 0 or -1 for all, got -2"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"min_p": 2.0}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"frequency_penalty": 3.0}, "frequency_penalty must be in"),
        ({"presence_penalty": -3.0}, "presence_penalty must be in"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias must be"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be not empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, or None, got 0"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens must be in \[0, max_tokens=4\], got 5"),
        ({"logprobs": -2}, "logprobs must be"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be"),
        ({"stop": ""}, "stop must be texts that are not empty"),
        ({"stop": ["a", ""]}, "stop must be"),
        ({"stop": 5}, "stop must be texts that are not empty, got 5"),
        ({"max_tokens": 10.5}, "max_tokens must be an integer, got 10.5"),
        ({"n": None}, "n must be an integer, got None"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"seed": 2**70}, "seed must be in"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, or None, got 5"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)


def test_stop_texts_come_as_one_or_many():
    assert SamplingParams().stops == ()
    assert SamplingParams(stop="a").stops == ("a",)
    assert SamplingParams(stop=["a", "bc"]).stops == ("a", "bc")


def test_the_package_and_its_parameters_load_without_torch():
    code = "import sys, anabranch; anabranch.SamplingParams(); assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_an_unknown_name_is_an_attribute_error():
    import anabranch

    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        anabranch.LLMs  # noqa: B018
    assert {"LLM", "SamplingParams", "__version__"} <= set(dir(anabranch))
