"""The page at /, in a real browser: headless Chromium, told what to do by the DevTools protocol over two pipes."""

import base64
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import count

import httpx
import pytest

from anabranch.serve.http.app import PLAYGROUND

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt install chromium)")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
LIMIT_S = 60  # nothing waits as long unless it is broken
MAIN = "import sys; from anabranch.cli import main; sys.exit(main())"
KEYS = {"Escape": 27, "Enter": 13}
CONTROL = 2
PROMPT = "import os\n\n\ndef "


class Browser:
    """A Chromium process. It reads commands from descriptor 3 and writes answers and events to 4, each ended by a 0."""

    def __init__(self, profile):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]  # 3 and 4 are not theirs
        actions = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawn(BROWSER, command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._numbers, self._rest, self.events = count(1), b"", []

    def call(self, method, session=None, **params):
        """The result of one command; events that come before it are kept."""
        message = {"id": next(self._numbers), "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != message["id"]:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], LIMIT_S)[0], "the browser is silent"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser is gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self):
        os.close(self._out)
        os.close(self._in)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Page:
    """One page, in a profile of its own."""

    def __init__(self, browser, url, *, width=1280, height=800, **media):
        self._browser, self.url = browser, url
        context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": f"prefers-{name}".replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=f"{url}/")
        self.until("!!document.querySelector('#hint')?.textContent")  # what connecting writes last

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def eval(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (expression, result)
        return result["result"].get("value")

    def until(self, expression):
        """The expression's value when it is true at last."""
        end = time.monotonic() + LIMIT_S
        while not (value := self.eval(expression)):
            assert time.monotonic() < end, f"never true: {expression}; the page: {self.eval('document.body.innerText')}"
            time.sleep(0.01)
        return value

    def click(self, selector):
        self.eval(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y, width, height = self.eval(
            f"(({{x, y, width, height}}) => [x, y, width, height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x + width / 2, "y": y + height / 2}
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def press(self, key, modifiers=0):
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key],
                modifiers=modifiers,
            )  # fmt: skip

    def fill(self, selector, text):
        """Replace what a field holds, as typing would, and leave it."""
        self.eval(f"document.querySelector({selector!r}).focus(); document.activeElement.select?.()")
        self.call("Input.insertText", text=text) if text else self.eval("document.execCommand('delete')")
        self.eval("document.activeElement.blur()")

    def send(self, text, **fields):
        for name, value in fields.items():
            self.fill(f"[name={name}]", str(value))
        self.fill("#prompt", text)
        self.click("#send")

    def answered(self):
        """The text of the last answer, when it is whole."""
        self.until("!!document.querySelector('article') && !document.querySelector('[aria-busy]')")
        return self.eval("[...document.querySelectorAll('article .text')].at(-1).lastChild.data")

    def footer(self):
        return self.eval("[...document.querySelectorAll('article footer')].at(-1).textContent")

    def events(self, method):
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in mine if event["method"] == method]

    def bodies(self):
        """What was posted, as JSON."""
        requests = [event["request"] for event in self.events("Network.requestWillBeSent")]
        return [json.loads(request["postData"]) for request in requests if request["method"] == "POST"]

    def complaints(self):
        """Everything the browser's console would show in red."""
        logged = [entry["entry"]["text"] for entry in self.events("Log.entryAdded")]
        console = [entry for entry in self.events("Runtime.consoleAPICalled") if entry["type"] in ("error", "warning")]
        return [*logged, *console, *self.events("Runtime.exceptionThrown")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture
def open_page(browser):
    """`open_page(url, width=400, color_scheme="dark")`."""
    return lambda url, **how: Page(browser, url, **how)


@pytest.fixture(scope="module")
def shipped():
    """The address of `anabranch serve` over the model in the package."""
    command = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--served-model-name", "bytes", "alias"]
    environment = {**os.environ, "ANABRANCH_API_KEY": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process.stdout.readline().split()[-1]
        process.terminate()


@pytest.fixture
def stepped(start):
    """A server with one place, and a semaphore: each release lets the model take one step."""
    server, steps = start(max_num_seqs=1), threading.Semaphore(0)
    forward = server.llm.engine.runner.forward

    def wait_and_pass(step):
        assert steps.acquire(timeout=LIMIT_S)
        return forward(step)

    server.llm.engine.runner.forward = wait_and_pass
    yield server, steps
    steps.release(10_000)


@pytest.mark.parametrize(("kind", "tag"), [("script", '<script type="module">'), ("style", "<style>")])
def test_the_policy_allows_this_script_and_this_style(kind, tag):
    page = PLAYGROUND.read_text()
    inline = page.partition(tag)[2].partition(f"</{kind}>")[0]
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert f"{kind}-src 'sha256-{digest}'" in page


def test_nothing_is_stored_and_nothing_comes_from_elsewhere():
    page = PLAYGROUND.read_text()
    assert not re.search(r"Storage|cookie|indexedDB|caches|@import|url\(", page)
    assert set(re.findall(r"https?://[^'\"\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, never asked for
    assert all(link.startswith("data:") for link in re.findall(r"(?:src|href|action)=\"([^\"]*)", page))


@needs_browser
def test_it_loads_alone_and_without_complaints(open_page, shipped):
    page = open_page(shipped)
    assert page.until("document.querySelector('#running').textContent !== '–'")
    assert page.complaints() == []
    urls = {event["request"]["url"] for event in page.events("Network.requestWillBeSent")}
    assert {url for url in urls if not url.startswith("data:")} == {
        f"{shipped}/{path}" for path in ("", "v1/models", "tokenizer_info", "metrics")
    }
    assert page.eval("[...document.querySelector('#model').options].map(({value}) => value)") == ["bytes", "alias"]
    assert page.eval("document.querySelector('[name=mode]:checked').value") == "completion"  # it has no chat template


@needs_browser
def test_everything_that_can_be_used_has_a_name(open_page, shipped):
    nodes = open_page(shipped).call("Accessibility.getFullAXTree")["nodes"]
    kinds = ("textbox", "spinbutton", "combobox", "radio", "button", "meter", "log")
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in kinds]
    assert sorted(found) == sorted([
        ("combobox", "Model"), ("radio", "Chat"), ("radio", "Completion"), ("meter", "cache use"),
        ("textbox", "API key, kept in this page only"), ("spinbutton", "Temperature"), ("spinbutton", "Top p"),
        ("spinbutton", "Top k"), ("spinbutton", "Min p"), ("spinbutton", "Repetition penalty"),
        ("spinbutton", "Max tokens"), ("spinbutton", "Seed"), ("textbox", r"Stop texts, one a line (\n, \t, \\)"),
        ("textbox", "System message of chats"), ("log", "Answers"), ("textbox", "Prompt"), ("button", "Clear"),
        ("button", "Stop Esc"), ("button", "Send Ctrl ↵"),
    ])  # fmt: skip


@needs_browser
def test_a_completion_is_that_of_the_api_for_the_same_seed(open_page, shipped):
    page = open_page(shipped)
    page.send(PROMPT, seed=11, max_tokens=60)
    fields = {"seed": 11, "max_tokens": 60, "temperature": 0.7}
    answer = httpx.post(f"{shipped}/v1/completions", json={"prompt": PROMPT, **fields}, timeout=LIMIT_S).json()
    assert page.answered() == answer["choices"][0]["text"]
    assert re.fullmatch(
        r"60 tokens · [\d.]+ tokens/s · first after [\d.]+ m?s · prompt 16 tokens · ended by length", page.footer()
    )
    assert page.eval("document.querySelector('#prompt').value") == PROMPT  # to be tried again


@needs_browser
def test_controls_reach_the_request(open_page, shipped):
    page = open_page(shipped)
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "max_tokens": 7,
        "seed": 3,
    }  # fmt: skip
    page.eval("document.querySelector('#model').value = 'alias'")
    page.fill("#stop", "\\n\\n\nEND\\\\")
    page.send(PROMPT, **fields)
    page.answered()
    page.fill("#stop", "")
    page.send("", **dict.fromkeys(fields, ""))
    page.answered()
    streamed = {"model": "alias", "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    assert page.bodies() == [
        {"prompt": PROMPT, "stop": ["\n\n", "END\\"], **fields, **streamed}, {"prompt": "", **streamed},
    ]  # fmt: skip
    assert len(page.eval("document.querySelector('article .error').textContent")) > 0  # the second has no token
    page.send(PROMPT, seed=2**53)  # which JavaScript cannot tell from the number after it
    assert page.eval("document.querySelector('[name=seed]:invalid') !== null")
    assert page.eval("document.querySelectorAll('article').length") == 2


@needs_browser
def test_a_chat_goes_on(open_page, server):
    page = open_page(server.url)
    assert page.eval("document.querySelector('[name=mode]:checked').value") == "chat"
    page.fill("#system", "Be brief.")
    fields = {"seed": 1, "max_tokens": 12}
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("Hello", '<img src="data:," onerror="document.title = 1">'):
        messages.append({"role": "user", "content": question})
        page.send(question, **fields)
        expected = server.chat(messages, temperature=0.7, **fields)["choices"][0]["message"]["content"]
        assert page.answered() == expected
        assert page.bodies()[-1]["messages"] == messages
        messages.append({"role": "assistant", "content": expected})
    assert page.eval("document.querySelector('#prompt').value") == ""
    assert page.eval("document.querySelectorAll('article.user .text')[1].textContent") == question
    assert page.eval("document.querySelector('#log img')") is None
    page.click("#clear")
    page.send("Again", **fields)
    page.answered()
    assert page.bodies()[-1]["messages"] == [messages[0], {"role": "user", "content": "Again"}]
    assert page.complaints() == []


@needs_browser
def test_text_cannot_become_html(open_page, server):
    page = open_page(server.url)
    assert page.eval("(() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } })()")
    assert page.eval("document.querySelector('b')") is None


@needs_browser
@pytest.mark.parametrize("how", ["click", "key"])
def test_stop_frees_the_place_for_who_waits(open_page, stepped, how):
    server, steps = stepped
    page, other = open_page(server.url), open_page(server.url)
    page.fill("#prompt", "Hello")
    page.eval("document.querySelector('#prompt').focus()")
    page.press("Enter", CONTROL)
    steps.release(3)
    page.until("document.querySelector('article.chat footer')?.textContent.startsWith('3 tokens · ')")
    other.send("Hi", max_tokens=2)
    shown = "['#running', '#waiting', '#cache'].map((id) => document.querySelector(id).textContent).join(' ')"
    assert page.until(f"({shown}).startsWith('1 1 ') && {shown}") == "1 1 12.5 %"  # one block of eight
    page.click("#abort") if how == "click" else page.press("Escape")
    page.answered()
    assert page.footer().startswith("3 tokens · ")
    assert page.footer().endswith(" · stopped")
    server.until(lambda: server.free_blocks == server.all_blocks)  # while the fourth step is still under way
    steps.release(3)
    other.answered()
    assert other.footer().startswith("2 tokens · ")
    assert page.until(f"{shown} === '0 0 0.0 %'")


@needs_browser
def test_a_wrong_key_is_told_and_a_right_one_stays_in_the_page(open_page, start):
    server = start(api_key="sk-right")
    told = httpx.get(f"{server.url}/v1/models").json()["error"]["message"]
    page = open_page(server.url)
    assert page.eval("document.querySelector('#notice').textContent") == told
    page.fill("#key", "sk-wrong")
    page.send("Hello")
    page.answered()
    assert page.eval("document.querySelector('article .error').textContent") == told
    page.fill("#key", "sk-right")
    page.until("document.querySelector('#notice').textContent === ''")
    page.until("document.querySelector('#running').textContent === '0'")
    page.send("Hello", max_tokens=3)
    page.answered()
    assert page.footer().startswith("3 tokens · ")
    kept = "[location.href, document.cookie, localStorage.length, sessionStorage.length]"
    assert page.eval(kept) == [f"{server.url}/", "", 0, 0]
    assert not any("sk-" in event["request"]["url"] for event in page.events("Network.requestWillBeSent"))
    page.call("Page.reload")
    page.until(f"document.querySelector('#notice')?.textContent === {json.dumps(told)}")
    assert page.eval("document.querySelector('#key').value") == ""


@needs_browser
def test_errors_are_shown_as_the_server_says_them(open_page, start):
    server = start()
    error = "document.querySelector('article:last-child .error').textContent"
    page = open_page(server.url)
    page.send("Hello", temperature=-1)
    page.answered()
    said = server.chat([{"role": "user", "content": "Hello"}], temperature=-1, expect=400)["error"]["message"]
    assert page.eval(error) == said
    server.gate.failure = RuntimeError("out of paper")  # the stream has begun by then
    page.send("Hello", temperature=1)
    page.answered()
    assert "out of paper" in page.eval(error)
    assert page.eval("document.querySelector('#prompt').value") == "Hello"
    server.gate.failure = None
    page.send("Hello", max_tokens=2)
    page.answered()
    assert page.bodies()[-1]["messages"] == [{"role": "user", "content": "Hello"}]


CONTRASTS = """(() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const linear = (part) => (part <= 10.31475 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (node) => {
    const colour = numbers(getComputedStyle(node).backgroundColor);
    return colour[3] === 0 ? ground(node.parentElement) : colour;
  };
  const hasText = (node) => [...node.childNodes].some(({ nodeType, data }) => nodeType === 3 && data.trim());
  const shown = [...document.body.querySelectorAll("*")].filter(
    (node) => hasText(node) && node.checkVisibility() && !node.closest(":disabled, script"));
  return shown.map((node) => {
    const [low, high] = [getComputedStyle(node).color, null].map((colour) =>
      luminance(colour ? numbers(colour) : ground(node))).sort((a, b) => a - b);
    return [node.outerHTML, (high + 0.05) / (low + 0.05)];
  });
})()"""


@needs_browser
@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(open_page, server, scheme, width):
    page = open_page(server.url, width=width, height=640, color_scheme=scheme)
    page.send("Hello " * 40 + "x" * 200, max_tokens=4)
    page.answered()
    page.send("Hello", max_tokens=4, top_p=2)
    page.answered()
    contrasts = page.eval(CONTRASTS)
    assert len(contrasts) > 15
    assert [(node, ratio) for node, ratio in contrasts if ratio < 4.5] == []  # WCAG 2.2, level AA
    assert page.eval("document.documentElement.scrollWidth") == width
    assert page.eval("document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")
    dark = page.eval("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 23)"
    assert dark == (scheme == "dark")
