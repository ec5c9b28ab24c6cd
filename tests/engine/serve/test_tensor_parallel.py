"""Models that several processes hold together: the same tokens as from one, and clear ends when one of them is gone.

Ranks are real processes here; what they compute is tested without any in models/test_shard.py. Sums in another order
move logits by some 1e-6, far less than the distances between the tokens that are compared.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from anabranch import LLM, SamplingParams
from anabranch.cli import main
from anabranch.models.weights import save_model
from anabranch.serve import runner, tensor_parallel
from anabranch.serve.llm import RequestError
from anabranch.serve.tensor_parallel import WorkerError, Workers


def greedy(count, **rest):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **rest)


def alive(process):
    """Whether a process still runs; one that nobody has waited for does not count."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(llm):
    return [process.pid for process in llm._workers._processes]


@pytest.fixture(scope="session")
def stories(data):
    return data("stories260k")


@pytest.fixture(scope="session")
def expected(stories):
    return json.loads((stories / "expected_greedy.json").read_text())["ids"]


@pytest.fixture(scope="module")
def pair(stories):
    """Two processes with a cache of 14 blocks of 8 tokens, so that four sequences do not fit."""
    block = 8 * 5 * 2 * 2 * 8 * 4  # bytes on each rank: tokens, layers, K and V, heads, width, float32
    llm = LLM(
        stories, tensor_parallel_size=2, cache_bytes=14 * block, block_size=8, max_model_len=110,
        max_num_batched_tokens=23, max_num_seqs=4,
    )  # fmt: skip
    yield llm
    llm.close()


def test_two_processes_write_the_known_text(pair, expected):
    assert pair.engine.config.num_blocks == 14
    (result,) = pair.generate([expected[:1]], greedy(30))
    assert result.outputs[0].token_ids == expected[1:31]


def test_chunks_preemption_and_shared_prefixes(pair, expected):
    preemptions = pair.engine.scheduler.preemptions
    starts = [30, 30, 41, 12, 26]  # beyond a step's 23 tokens, twice the same, and more than the cache holds
    results = pair.generate([expected[:start] for start in starts], greedy(12))
    assert [result.outputs[0].token_ids for result in results] == [expected[start : start + 12] for start in starts]
    assert pair.engine.scheduler.preemptions > preemptions
    assert sum(result.num_cached_tokens for result in results) > 0


def test_logprobs_of_prompt_and_output_equal_those_of_one_process(pair, stories, expected):
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=2)
    prompts = [expected[:70], expected[5:12]]  # more positions than are scored at once
    for one, two in zip(LLM(stories).generate(prompts, params), pair.generate(prompts, params), strict=True):
        assert two.prompt_logprobs[0] is None
        assert len(two.prompt_logprobs) == len(one.prompt_logprobs)
        pairs = [*zip(one.prompt_logprobs[1:], two.prompt_logprobs[1:], strict=True)]
        pairs += zip(one.outputs[0].logprobs, two.outputs[0].logprobs, strict=True)
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for token, found in ours.items():
                assert theirs[token].rank == found.rank
                assert theirs[token].logprob == pytest.approx(found.logprob, abs=1e-4)  # logits up to 10, 1e-5 of them


def test_a_seeded_sample_is_the_same(pair, stories, expected):
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=12)
    (one,), (two,) = LLM(stories).generate([expected[:9]], params), pair.generate([expected[:9]], params)
    assert two.outputs[0].token_ids == one.outputs[0].token_ids


def test_ctrl_c_waits_for_the_exchange_and_the_ranks_go_on(pair, expected, monkeypatch):
    compute, calls = runner.compute, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.generate([expected[:9]], greedy(12))
    assert len(calls) == 3
    assert not pair.engine.has_unfinished()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (result,) = pair.generate([expected[:9]], greedy(4))
    assert result.outputs[0].token_ids == expected[9:13]


def test_any_thread_may_drive_the_ranks(pair, expected):
    with ThreadPoolExecutor(1) as threads:
        (result,) = threads.submit(pair.generate, [expected[:9]], greedy(4)).result()
    assert result.outputs[0].token_ids == expected[9:13]


def test_four_processes_with_one_k_head_each_until_they_are_closed(stories, expected):
    llm = LLM(stories, tensor_parallel_size=4)
    assert llm.engine.runner.model.config.k_heads == 1
    (result,) = llm.generate([expected[:5]], greedy(10))
    assert result.outputs[0].token_ids == expected[5:15]
    processes = list(llm._workers._processes)
    llm.close()
    llm.close()
    assert [process.returncode for process in processes] == [0, 0, 0]  # they ended by themselves
    with pytest.raises(RequestError, match="the workers are closed"):
        llm.generate([expected[:3]], greedy(2))


def test_repeated_k_heads_in_an_int8_cache(build, tmp_path):
    """Hq, Hk, Hv = 4, 1, 2 with AugQ: each of two ranks holds the one K head and one V head."""
    save_model(build(q_intermediate_size=24, augq_residual=True, eos_ids=()), tmp_path)
    prompts = [[5, 9, 60, 2, 2, 41], list(range(10, 40))]
    params = greedy(6, prompt_logprobs=0)
    one = LLM(tmp_path, cache_dtype="int8", block_size=4).generate(prompts, params)
    llm = LLM(tmp_path, cache_dtype="int8", block_size=4, tensor_parallel_size=2)
    two = llm.generate(prompts, params)
    cache = llm.engine.runner.caches[0]
    assert (cache.k.shape[1], cache.v.shape[1], cache.k.dtype) == (1, 1, torch.int8)
    llm.close()
    for ours, theirs in zip(one, two, strict=True):
        assert theirs.outputs[0].token_ids == ours.outputs[0].token_ids
        for mine, other in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            for token, found in mine.items():
                # a key on the edge between two steps of 127 may fall on the other side
                assert other[token].logprob == pytest.approx(found.logprob, abs=0.05)


def test_the_command_takes_the_number_of_processes(stories, capsys, monkeypatch):
    monkeypatch.setattr("anabranch_kernels.roofline.read_bandwidth", lambda device: 1e9)
    arguments = ["generate", str(stories), "--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0"]
    assert main([*arguments, "--json", "--tensor-parallel-size", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"].startswith(", there was a ")
    assert report["roof_share"] is None
    assert main([*arguments, "--tensor-parallel-size", "3"]) == 2
    assert "tensor_parallel_size must divide the 8 query heads, got 3" in capsys.readouterr().err


def test_what_cannot_work_starts_no_process(stories, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "_start", lambda settings: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1, got 0"):
        LLM(stories, tensor_parallel_size=0)
    for size, device, message in [
        (16, "cpu", "must divide the 8 query heads, got 16"),
        (2, "meta", "tensor_parallel_size=2 needs device 'cpu' or 'cuda', got 'meta'"),
        (2, "cuda:1", "ranks take GPUs 0 to 1, got device 'cuda:1'; choose by CUDA_VISIBLE_DEVICES"),
        (8, "cuda", "tensor_parallel_size=8 needs as many GPUs, torch finds 0"),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match=message):
            Workers(stories, size, dtype=None, device=torch.device(device))


def test_a_worker_that_is_killed_is_named(stories, expected, monkeypatch):
    llm = LLM(stories, tensor_parallel_size=2)
    (worker,) = workers_of(llm)
    compute, calls = runner.compute, []

    def kill_later(*args):
        calls.append(args)
        if len(calls) == 4:
            os.kill(worker, signal.SIGKILL)
        return compute(*args)

    monkeypatch.setattr(runner, "compute", kill_later)
    message = rf"the worker of rank 1 of 2 \(process {worker}\) was killed by SIGKILL; load the model again"
    start = time.monotonic()
    with pytest.raises(RequestError, match=message):
        llm.generate([expected[:9]], greedy(50))
    with pytest.raises(RequestError, match=message):  # and it is said again to whoever comes next
        llm.generate([expected[:9]], greedy(2))
    assert time.monotonic() - start < 10
    assert not llm.engine.has_unfinished()


def test_a_worker_that_does_not_answer_is_given_up(stories, expected):
    llm = LLM(stories, tensor_parallel_size=2)
    (worker,) = workers_of(llm)
    llm._workers.group._backend.set_timeout(timedelta(seconds=2))
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(RequestError, match=r"WorkerError: rank 0 failed, RuntimeError: .*Timed out waiting 2000ms"):
        llm.generate([expected[:9]], greedy(2))
    assert not alive(worker)


def test_a_worker_that_cannot_load_says_why(stories, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((stories / name).read_bytes()[:5000])
    workers = Workers(tmp_path, 2, dtype=None, device=torch.device("cpu"))
    with pytest.raises(WorkerError, match=r"ended with status 1, ValueError: .*is cut short.* while it loaded the mod"):
        workers.join()
    assert not workers.close.alive


def test_a_setting_that_is_refused_late_leaves_no_process(stories, monkeypatch):
    started = []
    start = tensor_parallel._start
    monkeypatch.setattr(tensor_parallel, "_start", lambda settings: started.append(start(settings)) or started[-1])
    with pytest.raises(ValueError, match="10 bytes of cache hold 0 blocks"):
        LLM(stories, tensor_parallel_size=2, cache_bytes=10)
    assert [process.returncode for process in started] == [0]


def test_an_llm_that_is_collected_ends_its_workers(stories, threads):
    threads(4)
    llm = LLM(stories, tensor_parallel_size=2)
    (worker,), meeting = workers_of(llm), llm._workers._meeting
    assert torch.get_num_threads() == 2
    assert alive(worker)
    assert meeting.stat().st_mode & 0o077 == 0  # nobody else may write where the ranks meet
    del llm
    gc.collect()
    assert not alive(worker)
    assert not meeting.exists()
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the state of processes")
def test_workers_end_with_a_rank_0_that_is_killed(stories):
    script = (
        "import os, time\n"
        "from anabranch import LLM\n"
        f"llm = LLM({str(stories)!r}, tensor_parallel_size=2)\n"  # no guard for __main__: nothing runs the script again
        "child = os.fork()\n"  # it keeps the pipes open, so no worker comes to their end
        "if child: print(child, llm._workers._processes[0].pid, llm._workers._meeting, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leader:
        leader.stdin.write(script)
        leader.stdin.close()
        child, worker, meeting = leader.stdout.readline().split()
        child, worker, meeting = int(child), int(worker), Path(meeting)
        assert alive(worker)
        assert meeting.exists()
        leader.kill()
    try:
        wait_until(lambda: not alive(worker))
        assert alive(child)
        assert not meeting.exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_second_ctrl_c_is_heard_at_once():
    def press_twice():
        with tensor_parallel._interrupts_wait():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                reached.append(1)

    reached = []
    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
