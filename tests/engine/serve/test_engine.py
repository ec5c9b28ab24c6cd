"""The engine over a small model with random weights, against the slow way of doing the same."""

import random
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from anabranch.serve.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
RNG = random.Random(1)
PROMPTS = [[RNG.randrange(4, 97) for _ in range(length)] for length in (1, 3, 4, 5, 17, 30, 8, 2, 23, 16)]
STEM = PROMPTS[5][:16]
SHARED = [STEM + prompt for prompt in PROMPTS]
ROOMS = {
    "roomy": {},
    "chunked": {"max_num_batched_tokens": 8},
    "cramped": {"num_blocks": 20, "max_num_batched_tokens": 9, "max_model_len": 80},
    "one-at-a-time": {"max_num_seqs": 1, "max_num_batched_tokens": 3},
    "wide-blocks": {"num_blocks": 12, "block_size": 16},
    "no-sharing": {"enable_prefix_caching": False, "num_blocks": 24, "max_model_len": 80},
}


def letters():
    """A tokenizer whose token n is the character of code 32 + n."""
    tokenizer = Tokenizer(models.WordLevel({chr(32 + n): n for n in range(97)}, unk_token=" "))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def add_all(engine, prompts, params=GREEDY, **rest):
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params, **rest)


def tokens_of(done, count):
    return [done[str(number)].outputs[0].token_ids for number in range(count)]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("prompts", [PROMPTS, SHARED], ids=["different", "shared-stem"])
def test_many_requests_get_what_each_gets_alone(model, make_engine, finish, naive_greedy, room, prompts):
    engine = make_engine(**ROOMS[room])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    arrivals = iter(enumerate(prompts))
    done = {}
    for number, prompt in arrivals:  # they come while others run
        engine.add_request(str(number), prompt, params)
        for _ in range(number % 3):
            done |= {output.request_id: output for output in engine.step()}
    done |= finish(engine)
    assert tokens_of(done, len(prompts)) == [naive_greedy(model, prompt, 12) for prompt in prompts]
    assert engine.scheduler.pool.num_free == engine.config.num_blocks
    if room == "cramped":
        assert engine.scheduler.preemptions > 0
    if prompts is SHARED and room == "roomy":
        assert sum(output.num_cached_tokens for output in done.values()) >= 16


def test_a_second_visit_is_served_from_the_cache(model, make_engine, finish, naive_greedy):
    engine = make_engine()
    add_all(engine, PROMPTS)
    first = tokens_of(finish(engine), len(PROMPTS))
    add_all(engine, PROMPTS)
    done = finish(engine)
    assert tokens_of(done, len(PROMPTS)) == first
    assert [done[str(n)].num_cached_tokens for n in range(len(PROMPTS))] == [(len(p) - 1) // 4 * 4 for p in PROMPTS]
    engine.reset_prefix_cache()
    add_all(engine, PROMPTS[:1] + PROMPTS[5:6])
    assert [output.num_cached_tokens for output in finish(engine).values()] == [0, 0]


def test_salts_keep_caches_apart(make_engine, finish):
    engine = make_engine()
    hits = []
    for salt in ("", "a", "a", "b"):
        engine.add_request("x", PROMPTS[5], GREEDY, cache_salt=salt)
        hits.append(finish(engine)["x"].num_cached_tokens)
    assert hits == [0, 0, 28, 0]


def test_a_seeded_sample_does_not_depend_on_its_company(make_engine, finish):
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=11, max_tokens=20, repetition_penalty=1.1)
    alone = make_engine()
    alone.add_request("x", PROMPTS[4], params)
    want = finish(alone)["x"].outputs[0].token_ids
    crowded = make_engine(num_blocks=24, max_num_batched_tokens=9, max_model_len=80)
    for number, prompt in enumerate(PROMPTS):
        crowded.add_request(f"other {number}", prompt, SamplingParams(temperature=1.5, seed=number, max_tokens=20))
        if number == 4:
            crowded.add_request("x", PROMPTS[4], params)
    assert finish(crowded)["x"].outputs[0].token_ids == want
    assert crowded.scheduler.preemptions > 0


def test_samples_of_one_prompt_are_those_of_consecutive_seeds(make_engine, finish):
    engine = make_engine()
    many = SamplingParams(n=4, seed=5, max_tokens=10, ignore_eos=True)
    engine.add_request("many", PROMPTS[5], many)
    outputs = finish(engine)["many"].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    for index, output in enumerate(outputs):
        engine.add_request("one", PROMPTS[5], SamplingParams(seed=5 + index, max_tokens=10, ignore_eos=True))
        assert finish(engine)["one"].outputs[0].token_ids == output.token_ids
    assert len({tuple(output.token_ids) for output in outputs}) > 1


def test_samples_of_one_prompt_share_its_blocks(make_engine):
    engine = make_engine()
    engine.add_request("x", PROMPTS[5], SamplingParams(n=4, max_tokens=10))
    engine.step()
    pool = engine.scheduler.pool
    assert pool.num_blocks - pool.num_free == 7 + 4  # 28 of 30 tokens in common, and each its own last block


def test_requests_without_a_seed_follow_the_engines(make_engine, finish):
    def run(seed):
        engine = make_engine(seed=seed)
        add_all(engine, PROMPTS, SamplingParams(max_tokens=8))
        return tokens_of(finish(engine), len(PROMPTS))

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("room", ["roomy", "cramped"])
@pytest.mark.parametrize("count", [0, 3, -1])
def test_logprobs_of_prompt_and_output_are_the_models(model, make_engine, finish, dense, room, count):
    engine = make_engine(**ROOMS[room])
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=count, prompt_logprobs=count, ignore_eos=True)
    for _ in range(2):  # the second time the prompts are in the cache
        add_all(engine, PROMPTS, params)
        done = finish(engine)
    for number, prompt in enumerate(PROMPTS):
        result = done[str(number)]
        output = result.outputs[0]
        tokens = prompt + output.token_ids
        want = model.logits(dense(model, tokens)).log_softmax(-1)
        assert result.prompt_logprobs[0] is None
        positions = [*result.prompt_logprobs[1:], *output.logprobs]
        assert len(positions) == len(tokens) - 1
        for place, found in enumerate(positions):
            best = want[place].argsort(descending=True).tolist()
            asked = len(best) if count == -1 else count
            assert list(found) == list(dict.fromkeys([tokens[place + 1], *best[:asked]]))
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(want[place, token].item(), abs=1e-4)
                assert entry.rank == best.index(token) + 1
        chosen = sum(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
        assert output.cumulative_logprob == pytest.approx(chosen)


def test_no_logprobs_unless_asked(make_engine, finish):
    engine = make_engine()
    engine.add_request("x", PROMPTS[3], GREEDY)
    result = finish(engine)["x"]
    assert (result.prompt_logprobs, result.outputs[0].logprobs, result.outputs[0].cumulative_logprob) == (None,) * 3


def ends(engine, finish, prompt, params):
    engine.add_request("x", prompt, params)
    output = finish(engine)["x"].outputs[0]
    return output.token_ids, output.finish_reason, output.stop_reason


def test_reasons_to_stop(model, make_engine, finish, naive_greedy):
    engine = make_engine()
    path = naive_greedy(model, PROMPTS[4], 20)
    third = next(n for n in range(2, 20) if path[n] not in path[:n] and path[n] != 3)
    token = path[third]

    def run(**rules):
        return ends(engine, finish, PROMPTS[4], SamplingParams(temperature=0, **rules))

    assert run(max_tokens=5, ignore_eos=True) == (path[:5], "length", None)
    assert run(max_tokens=20, ignore_eos=True, stop_token_ids=[token]) == (path[: third + 1], "stop", token)
    tokens, reason, _ = run(max_tokens=20, ignore_eos=True, stop_token_ids=[token], min_tokens=third + 2)
    assert token not in tokens[: third + 2]
    assert reason in ("length", "stop")
    tokens, reason, _ = run(max_tokens=None, ignore_eos=True)
    assert (len(tokens) + len(PROMPTS[4]), reason) == (engine.config.max_model_len, "length")


def test_the_models_end_token_stops_without_being_named(model, make_engine, finish, naive_greedy):
    engine = make_engine()
    path = naive_greedy(model, PROMPTS[4], 20)
    engine.eos_ids = frozenset({path[4]})
    cut = path[: path.index(path[4]) + 1]
    params = SamplingParams(temperature=0, max_tokens=20)
    assert ends(engine, finish, PROMPTS[4], params) == (cut, "stop", None)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[path[4]])
    assert ends(engine, finish, PROMPTS[4], params) == (cut, "stop", None)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[path[4]], ignore_eos=True)
    assert ends(engine, finish, PROMPTS[4], params) == (cut, "stop", path[4])


def test_text_leaves_out_what_stopped_it(model, make_engine, finish, naive_greedy):
    tokenizer = letters()
    engine = make_engine(tokenizer=tokenizer)
    path = naive_greedy(model, PROMPTS[4], 20)
    text = tokenizer.decode(path)
    for keep in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=20, stop=["never", text[3:5]], ignore_eos=True, include_stop_str_in_output=keep
        )
        engine.add_request("x", PROMPTS[4], params)
        output = finish(engine)["x"].outputs[0]
        at = text.index(text[3:5])
        assert output.text == text[: at + 2 if keep else at]
        assert output.token_ids == path[: at + 2]
        assert (output.finish_reason, output.stop_reason) == ("stop", text[3:5])
        engine.add_request(
            "x", PROMPTS[4],
            SamplingParams(temperature=0, stop_token_ids=[path[4]], ignore_eos=True, include_stop_str_in_output=keep),
        )  # fmt: skip
        first = path.index(path[4])
        assert finish(engine)["x"].outputs[0].text == text[: first + keep]


def test_a_stop_text_waits_for_the_minimum_length(model, make_engine, finish, naive_greedy):
    tokenizer = letters()
    engine = make_engine(tokenizer=tokenizer)
    text = tokenizer.decode(naive_greedy(model, PROMPTS[4], 20))
    stop = text[2]
    later = text.find(stop, 6)
    params = SamplingParams(temperature=0, max_tokens=20, stop=stop, min_tokens=7, ignore_eos=True)
    engine.add_request("x", PROMPTS[4], params)
    assert finish(engine)["x"].outputs[0].text == (text if later < 0 else text[:later])


def test_a_stream_adds_up_to_the_whole(make_engine, finish):
    tokenizer = letters()
    params = SamplingParams(n=3, seed=3, max_tokens=15, logprobs=1, stop="e", ignore_eos=True)
    engine = make_engine(tokenizer=tokenizer)
    engine.add_request("whole", PROMPTS[4], params)
    whole = finish(engine)["whole"].outputs
    engine.add_request("x", PROMPTS[4], params, stream=True)
    texts, tokens, logprobs, reasons = [""] * 3, [[], [], []], [[], [], []], [None] * 3
    while engine.has_unfinished():
        for output in engine.step():
            for part in output.outputs:
                assert reasons[part.index] is None
                texts[part.index] += part.text
                tokens[part.index] += part.token_ids
                logprobs[part.index] += part.logprobs
                reasons[part.index] = part.finish_reason
        assert output.finished == (not engine.has_unfinished())
    assert texts == [output.text for output in whole]
    assert tokens == [output.token_ids for output in whole]
    assert [[list(p) for p in one] for one in logprobs] == [[list(p) for p in output.logprobs] for output in whole]
    assert reasons == [output.finish_reason for output in whole]


def test_an_abort_frees_blocks_at_once(make_engine, finish):
    engine = make_engine()
    add_all(engine, PROMPTS, SamplingParams(n=2, max_tokens=50, ignore_eos=True, seed=0))
    for _ in range(3):
        engine.step()
    running = {sample.request.request_id for sample in engine.scheduler.running}
    assert "2" in running
    assert "9" not in running
    before = engine.scheduler.pool.num_free
    assert engine.abort("2")
    assert engine.scheduler.pool.num_free > before
    assert engine.abort("9")
    assert not engine.abort("2")
    assert not engine.abort("nobody")
    assert set(finish(engine)) == {str(n) for n in range(len(PROMPTS))} - {"2", "9"}
    assert engine.scheduler.pool.num_free == engine.config.num_blocks


def test_an_abort_and_an_arrival_while_a_step_runs(make_engine, finish, naive_greedy, model, monkeypatch):
    engine = make_engine(num_blocks=22, max_model_len=80)
    add_all(engine, PROMPTS[:6])
    forward, free = engine.runner.forward, []

    def interrupted(step):
        if len(free) == 0 and len(step.sequences) > 3:
            hidden = forward(step)
            assert engine.abort(step.sequences[2].request.request_id)
            engine.add_request("late", PROMPTS[8], GREEDY)
            free.append(engine.scheduler.pool.num_free)
            return hidden
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", interrupted)
    done = finish(engine)
    assert free
    assert len(done) == 6
    assert done["late"].outputs[0].token_ids == naive_greedy(model, PROMPTS[8], 12, stop_ids=(3,))
    for number, output in done.items():
        if number != "late":
            assert output.outputs[0].token_ids == naive_greedy(model, PROMPTS[int(number)], 12, stop_ids=(3,))


def test_nothing_comes_of_a_request_aborted_while_its_last_step_runs(make_engine, monkeypatch):
    engine = make_engine()
    forward = engine.runner.forward

    def aborting(step):
        hidden = forward(step)
        assert engine.abort("x")
        return hidden

    for stream in (False, True):
        monkeypatch.setattr(engine.runner, "forward", forward)
        engine.add_request("x", PROMPTS[4], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), stream=stream)
        engine.step()
        monkeypatch.setattr(engine.runner, "forward", aborting)
        assert engine.step() == []
        assert not engine.has_unfinished()
        assert engine.scheduler.pool.num_free == engine.config.num_blocks


def test_threads_may_add_and_abort_while_one_steps(make_engine, model, naive_greedy):
    engine = make_engine(num_blocks=40, max_model_len=80)
    want = {n: naive_greedy(model, prompt, 12, stop_ids=(3,)) for n, prompt in enumerate(PROMPTS)}
    done, added = {}, threading.Event()

    def clients():
        for turn in range(30):
            for number, prompt in enumerate(PROMPTS):
                engine.add_request(f"{turn} {number}", prompt, GREEDY)
            engine.abort(f"{turn} {turn % len(PROMPTS)}")
        added.set()

    client = threading.Thread(target=clients)
    client.start()
    while not added.is_set() or engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output.outputs[0].token_ids
    client.join()
    assert len(done) >= 30 * (len(PROMPTS) - 1)
    assert all(tokens == want[int(name.split()[1])] for name, tokens in done.items())
    assert engine.scheduler.pool.num_free == engine.config.num_blocks


def test_nan_ends_one_request_and_no_other(make_engine, finish, naive_greedy, model, monkeypatch):
    engine = make_engine()
    add_all(engine, PROMPTS[:5])
    logits, calls = engine.runner.logits, []

    def poisoned(hidden, rows):
        scores = logits(hidden, rows)
        calls.append(len(rows))
        if len(calls) == 4:
            scores[1, 7] = float("nan")
        return scores

    monkeypatch.setattr(engine.runner, "logits", poisoned)
    done = finish(engine)
    assert done["1"].error == "ValueError: the model's scores of the next token are not numbers (NaN)"
    assert done["1"].outputs[0].finish_reason == "error"
    assert len(done["1"].outputs[0].token_ids) == 3
    for number in (0, 2, 3, 4):
        assert done[str(number)].error is None
        assert done[str(number)].outputs[0].token_ids == naive_greedy(model, PROMPTS[number], 12, stop_ids=(3,))
    assert engine.scheduler.pool.num_free == engine.config.num_blocks


def test_text_that_cannot_be_decoded_ends_one_request(make_engine, finish):
    class Touchy:
        def __init__(self):
            self.inner, self.calls = letters(), 0

        def decode(self, ids, skip_special_tokens=True):
            self.calls += 1
            if self.calls == 12:
                raise KeyError("no such token")
            return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    engine = make_engine(tokenizer=Touchy())
    add_all(engine, PROMPTS[:4], SamplingParams(temperature=0, stop="never", max_tokens=12, ignore_eos=True))
    done = finish(engine)
    assert sorted(output.outputs[0].finish_reason for output in done.values()) == [
        "error",
        "length",
        "length",
        "length",
    ]
    assert [output.error for output in done.values() if output.error] == ["KeyError: 'no such token'"]
    assert engine.scheduler.pool.num_free == engine.config.num_blocks


def test_a_model_that_raises_takes_its_step_and_nothing_else(make_engine, finish, naive_greedy, model, monkeypatch):
    engine = make_engine(max_num_seqs=3)
    add_all(engine, PROMPTS)
    forward, failed = engine.runner.forward, set()

    def failing(step):
        hidden = forward(step)
        if {sample.request.request_id for sample in step.sequences} >= {"4", "5"} and not failed:
            assert step.registered
            for cache in engine.runner.caches:
                cache.k[step.registered] = float("nan")  # what a kernel that dies half way may leave
            failed.update(sample.request.request_id for sample in step.sequences)
            raise MemoryError("out of memory")
        return hidden

    monkeypatch.setattr(engine.runner, "forward", failing)
    done = finish(engine)
    assert len(failed) == 3
    assert failed == {number for number, output in done.items() if output.error == "MemoryError: out of memory"}
    assert engine.scheduler.pool.num_free == engine.config.num_blocks
    want = [naive_greedy(model, prompt, 12, stop_ids=(3,)) for prompt in PROMPTS]
    for number in {str(n) for n in range(len(PROMPTS))} - failed:
        assert done[number].outputs[0].token_ids == want[int(number)]
    add_all(engine, PROMPTS)  # the same prompts again: nothing of the broken step may be found in the cache
    assert tokens_of(finish(engine), len(PROMPTS)) == want


def test_an_interrupt_leaves_a_working_engine(make_engine, finish, naive_greedy, model, monkeypatch):
    engine = make_engine()
    add_all(engine, PROMPTS[:3])
    engine.step()
    forward = engine.runner.forward

    def interrupt(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine.runner, "forward", forward)
    assert not engine.has_unfinished()
    add_all(engine, PROMPTS[:3])
    want = [naive_greedy(model, prompt, 12, stop_ids=(3,)) for prompt in PROMPTS[:3]]
    assert tokens_of(finish(engine), 3) == want


@pytest.mark.parametrize(
    ("prompt", "rules", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 97], {}, r"token ids in prompt must be integers in \[0, 97\), got 97"),
        ([1, -1], {}, "got -1"),
        ([1, 2.0], {}, "got 2.0"),
        ([1], {"logit_bias": {97: 1.0}}, "token ids in logit_bias"),
        ([1], {"allowed_token_ids": [1, 100]}, "token ids in allowed_token_ids"),
        ([1], {"stop_token_ids": [-5]}, "token ids in stop_token_ids"),
        ([1], {"stop": "x"}, "stop texts need a tokenizer"),
        ([1] * 120, {}, "the prompt has 120 tokens; max_model_len=120 leaves room for 119"),
        ([1] * 60, {"max_tokens": 60}, "120 tokens need 30 cache blocks of 4 tokens, and the cache has 20"),
    ],
)
def test_a_request_that_can_never_run_is_refused(make_engine, prompt, rules, message):
    engine = make_engine(num_blocks=20)
    with pytest.raises(ValueError, match=message):
        engine.add_request("x", prompt, SamplingParams(**rules))
    assert not engine.has_unfinished()
    assert not engine.scheduler.waiting


def test_a_request_id_is_used_once_at_a_time(make_engine, finish):
    engine = make_engine()
    engine.add_request("x", [5], GREEDY)
    with pytest.raises(ValueError, match="request_id 'x' is already in use"):
        engine.add_request("x", [5], GREEDY)
    finish(engine)
    engine.add_request("x", [5], GREEDY)


def test_moments_are_in_order(make_engine, finish):
    engine = make_engine(max_num_batched_tokens=8)
    engine.add_request("x", PROMPTS[5], GREEDY)
    metrics = finish(engine)["x"].metrics
    assert metrics.arrival_s < metrics.first_token_s < metrics.finished_s


def test_windows_and_int8_caches_run_through_the_engine(build, make_engine, finish, naive_greedy):
    windowed = build(family="mistral", k_heads=2, v_heads=2, v_dim=8, windows=(5, 5))
    engine = make_engine(model=windowed, max_num_batched_tokens=8)
    add_all(engine, PROMPTS)
    want = [naive_greedy(windowed, prompt, 12, stop_ids=(3,)) for prompt in PROMPTS]
    assert tokens_of(finish(engine), len(PROMPTS)) == want
    small = make_engine(cache_dtype=torch.int8)
    add_all(small, PROMPTS)
    assert all(output.error is None for output in finish(small).values())
