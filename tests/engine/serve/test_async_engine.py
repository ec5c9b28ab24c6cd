"""The engine's thread and its jobs: places, ends, crashes, and readers that fall behind."""

import asyncio
import threading

import pytest

from anabranch.serve.async_engine import (
    AsyncEngine,
    EngineCrashed,
    EngineStopped,
    QueueFull,
    TokenPrompt,
    merge,
)
from anabranch.serve.request import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams

PROMPT = TokenPrompt([5, 6, 7, 8])
LONG = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture
def drive(make_engine):
    """`drive(test, max_queue=4)` runs a coroutine function with a started AsyncEngine."""

    def run(test, max_queue=8, **sizes):
        async def main():
            engine = AsyncEngine(make_engine(**sizes), max_queue=max_queue)
            engine.start()
            try:
                await test(engine)
            finally:
                await engine.stop()

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


async def collect(job):
    """Everything of a job, joined by prompt."""
    found = {}
    async for outputs in job:
        for index, output in outputs:
            found[index] = output if index not in found else merge(found[index], output)
    return found


def tokens(output):
    return [sample.token_ids for sample in sorted(output.outputs, key=lambda sample: sample.index)]


def test_a_stream_and_a_whole_answer_are_the_same(drive, model, naive_greedy):
    async def test(engine):
        found = []
        for stream in (True, False):
            job = engine.admit(2)
            await job.start([PROMPT, TokenPrompt([9, 9])], LONG, stream=stream)
            found.append({index: tokens(output) for index, output in (await collect(job)).items()})
            job.close()
        assert found[0] == found[1] == {0: [naive_greedy(model, PROMPT.ids, 40)], 1: [naive_greedy(model, [9, 9], 40)]}

    drive(test)


def test_a_reader_that_falls_behind_finds_one_output(drive, model, naive_greedy):
    async def test(engine):
        job = engine.admit(1)
        await job.start([PROMPT], LONG, stream=True)
        while engine.engine.has_unfinished():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        ((index, output),) = await anext(job)
        assert (index, output.finished, tokens(output)) == (0, True, [naive_greedy(model, PROMPT.ids, 40)])
        with pytest.raises(StopAsyncIteration):
            await anext(job)
        job.close()

    drive(test)


def test_beginnings_and_ends_do_not_wait_for_others(drive, model, naive_greedy, monkeypatch):
    monkeypatch.setattr("anabranch.serve.async_engine.GATHER_S", 3600.0)

    async def test(engine):
        for _ in range(2):  # the second comes right after a delivery
            job = engine.admit(1)
            await job.start([PROMPT], LONG, stream=True)
            parts = [output async for outputs in job for _, output in outputs]
            assert len(parts) <= 2  # the first token, and all others with the last
            found = [token for part in parts for token in part.outputs[0].token_ids]
            assert found == naive_greedy(model, PROMPT.ids, 40)
            job.close()

    drive(test)


def test_places_are_counted_and_given_back(drive):
    async def test(engine):
        with pytest.raises(ValueError, match="asks for 11 samples"):
            engine.admit(11)
        first = engine.admit(7)
        with pytest.raises(QueueFull):
            engine.admit(4)
        second = engine.admit(3)
        first.close()
        first.close()
        engine.admit(7).close()
        second.close()
        assert engine.traffic.rejected == 1

    drive(test, max_queue=2)  # beside 8 that run


def test_one_impossible_prompt_leaves_nothing_queued(drive):
    async def test(engine):
        job = engine.admit(2)
        with pytest.raises(ValueError, match="the prompt is empty"):
            await job.start([PROMPT, TokenPrompt([])], LONG, stream=False)
        job.close()
        assert not engine.engine.has_unfinished()

    drive(test)


def test_closing_while_prompts_are_being_queued_leaves_nothing(drive):
    async def test(engine):
        added, go_on = threading.Event(), threading.Event()
        add = engine.engine.add_request

        def slow(*args, **options):
            add(*args, **options)
            added.set()
            assert go_on.wait(30)

        engine.engine.add_request = slow
        job = engine.admit(2)
        starting = asyncio.ensure_future(job.start([PROMPT, PROMPT], SamplingParams(max_tokens=None), stream=True))
        await asyncio.to_thread(added.wait, 30)
        starting.cancel()
        closing = asyncio.create_task(asyncio.to_thread(job.close))
        await asyncio.sleep(0.01)
        go_on.set()
        await closing
        await asyncio.sleep(0.05)
        assert not engine.engine.has_unfinished()
        assert not engine._routes

    drive(test)


def test_a_crash_reaches_everybody_who_waits_and_everybody_who_comes(drive, caplog):
    async def test(engine):
        job = engine.admit(1)
        engine.engine.step = lambda: 1 / 0
        await job.start([PROMPT], LONG, stream=True)
        with pytest.raises(EngineCrashed, match="ZeroDivisionError"):
            await collect(job)
        job.close()
        assert "the engine has crashed" in engine.broken
        with pytest.raises(EngineCrashed):
            engine.admit(1)

    drive(test)
    assert "the engine's thread ended" in caplog.text


def test_stopping_fails_what_is_open(drive):
    async def test(engine):
        job = engine.admit(1)
        await job.start([PROMPT], SamplingParams(max_tokens=None), stream=True)
        engine.end(EngineStopped("enough"))
        with pytest.raises(EngineStopped, match="enough"):
            await collect(job)
        with pytest.raises(EngineStopped):
            engine.admit(1)
        job.close()

    drive(test)


def test_outputs_of_a_stream_join():
    def output(*samples, finished=False):
        metrics = RequestMetrics(arrival_s=0.0)
        return RequestOutput(
            request_id="a", prompt=None, prompt_token_ids=[1], outputs=list(samples), finished=finished, metrics=metrics
        )

    def sample(index, ids, text, reason=None, logprobs=None):
        return CompletionOutput(index=index, token_ids=ids, decoded=text, finish_reason=reason, logprobs=logprobs)

    older = output(sample(0, [1], "a"), sample(1, [2], "b", "stop"))
    newer = output(sample(2, [5], "e"), sample(0, [3, 4], "cd", "length"), finished=True)
    joined = merge(older, newer)
    assert joined.finished
    assert {(one.index, tuple(one.token_ids), one.text, one.finish_reason) for one in joined.outputs} == {
        (0, (1, 3, 4), "acd", "length"), (1, (2,), "b", "stop"), (2, (5,), "e", None),
    }  # fmt: skip
    (both,) = merge(output(sample(0, [1], None, logprobs=[{}])), output(sample(0, [2], None, logprobs=[{}]))).outputs
    assert (both.decoded, both.logprobs) == (None, [{}, {}])
