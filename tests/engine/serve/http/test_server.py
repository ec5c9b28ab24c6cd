"""From the first connection to the end by a signal, in this process: the signal goes to the test itself."""

import json
import os
import signal
import threading

import httpx
import pytest

from anabranch import LLM, SamplingParams
from anabranch.serve.http import server as server_module
from anabranch.serve.http.listen import bind, url
from anabranch.serve.http.server import serve
from anabranch.serve.http.settings import ServerSettings


@pytest.fixture
def run(folder, gate_of, capfd):
    """`run(client, drain_timeout_s=30)`: serve until a signal, with `client(url, gate, output)` in a thread."""

    def start(client, **settings):
        llm = LLM(folder)
        gate = gate_of(llm)
        options = ServerSettings(port=0, model_names=("tiny",), **settings)
        listener = bind(options)
        ready, results = threading.Event(), []
        startup = server_module.Server.startup

        async def startup_and_tell(self, sockets=None):
            await startup(self, sockets=sockets)
            ready.set()

        def work():
            assert ready.wait(60)
            try:
                results.append(client(url(listener), gate))
            except BaseException as error:
                results.append(error)
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                gate.open()

        thread = threading.Thread(target=work)
        thread.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module.Server, "startup", startup_and_tell)
            status = serve(llm, options, listener)
        thread.join(60)
        if isinstance(results[0], BaseException):
            raise results[0]
        return status, results[0], capfd.readouterr()

    return start


def stream(address, *, after_first, max_tokens=40):
    """Events of a stream; calls `after_first` between the first and the others."""
    body = {"prompt": "import os", "max_tokens": max_tokens, "temperature": 0, "stream": True}
    found = []
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if not line:
                continue
            found.append(line)
            if len(found) == 1:
                after_first()
    assert found[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in found[:-1]]


def interrupt(number):
    os.kill(os.getpid(), number)


def wait_until_closed(address):
    """Until nobody is let in any more."""
    while True:
        try:
            httpx.get(f"{address}/health", timeout=60)
        except httpx.ConnectError:
            return
        except (httpx.ReadError, httpx.RemoteProtocolError):
            pass  # let in at the last moment, and cut off with the listener


def test_sigterm_lets_running_requests_end(run, offline):
    def client(address, gate):
        def stop():
            interrupt(signal.SIGTERM)
            wait_until_closed(address)

        return stream(address, after_first=stop, max_tokens=400)

    status, events, printed = run(client)
    assert status == 0
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == offline.generate("import os", SamplingParams(max_tokens=400, temperature=0))[0].outputs[0].text
    assert printed.out.startswith("anabranch: tiny at http://127.0.0.1:")
    assert "Traceback" not in printed.err


def test_who_is_not_done_when_the_drain_is_over_is_told(run):
    def client(address, gate):
        def stop():
            gate.close()
            interrupt(signal.SIGTERM)

        return stream(address, after_first=stop, max_tokens=500)

    status, events, printed = run(client, drain_timeout_s=0.05)
    assert status == 0
    assert events[-1]["error"]["code"] == "server_stopping"
    assert "Traceback" not in printed.err


def test_ctrl_c_says_so_in_its_status(run):
    status, _, printed = run(lambda address, gate: interrupt(signal.SIGINT))
    assert status == 130
    assert "Traceback" not in printed.err


def test_ctrl_c_twice_waits_for_nobody(run):
    def client(address, gate):
        def stop():
            gate.close()
            interrupt(signal.SIGINT)
            wait_until_closed(address)
            interrupt(signal.SIGINT)

        with pytest.raises(httpx.RemoteProtocolError):
            stream(address, after_first=stop, max_tokens=500)

    status, _, _ = run(client, drain_timeout_s=600)
    assert status == 130


def test_handlers_are_put_back(run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(lambda address, gate: interrupt(signal.SIGTERM))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
