"""Tests of the server's page in a real browser: what it plays, shows and sends. All are slow."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason="the server needs starlette: pip install 'voxkern[serve]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx: pip install 'voxkern[test]'")

import httpx
from serving import serving, wait_for

import voxkern
from voxkern.reference.train.data import WORDS

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")  # Debian's chromium and chromium-driver
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1100,1000",
)
TEXT, LONG = "seven three one", " ".join(WORDS[:40])
KEY, MAX_CHARS = "a secret", 300

# runs before the page's script: records each played buffer, the time of its start, and refusals of the policy
RECORD = """
window.played = []; window.refused = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when) {
  const samples = Array.from(this.buffer.getChannelData(0));
  window.played.push({ samples, when, rate: this.buffer.sampleRate, at: performance.now() });
  return start.call(this, when);
};
document.addEventListener("securitypolicyviolation", (event) => window.refused.push(event.violatedDirective));
"""
# makes each part of a body end within a sample, after one byte or three
SPLIT = """
const read = ReadableStreamDefaultReader.prototype.read, rest = new WeakMap();
ReadableStreamDefaultReader.prototype.read = async function () {
  const left = rest.get(this) ?? await read.call(this);
  rest.delete(this);
  if (left.done || left.value.length < 2) return left;
  const n = left.value.length > 1000 ? 1 : Math.max(1, left.value.length - 3);
  rest.set(this, { done: false, value: left.value.slice(n) });
  return { done: false, value: left.value.slice(0, n) };
};
"""
# ends the body of the first sound early, as a server that stops does
CUT = """
const read = ReadableStreamDefaultReader.prototype.read;
let n = 0;
ReadableStreamDefaultReader.prototype.read = function () {
  return ++n > 2 ? Promise.reject(new TypeError("network error")) : read.call(this);
};
"""


@pytest.fixture(scope="module")
def demo() -> voxkern.TTS:
    return voxkern.load(device="cpu", backend="torch", max_batch=2)


@pytest.fixture(scope="module")
def expected(demo: voxkern.TTS) -> bytes:
    return demo.generate(TEXT, seed=1).pcm16()


@pytest.fixture(scope="module")
def address(demo: voxkern.TTS) -> Iterator[str]:
    """Serve the demo voice, two requests at most, and return the address."""
    with serving(demo, api_key=KEY, max_chars=MAX_CHARS, max_waiting=0, words=WORDS) as (client, _):
        yield str(client.base_url)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs a browser's driver: pip install selenium")
    for file, package in ((CHROMIUM, "chromium"), (DRIVER, "chromium-driver")):
        if not file.exists():
            pytest.skip(f"{file} is missing: apt-get install {package}")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    # the driver's path is given and downloads are off, so selenium does not look for a browser in the network
    env = os.environ | {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    running = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER), env=env))
    running.set_page_load_timeout(30)
    running.set_script_timeout(30)
    try:
        yield running
    finally:
        running.quit()


class Page:
    """The page in a browser.

    Attributes:
        expected_errors: the errors that the browser's log must have at the end of a test, as regular expressions.
    """

    def __init__(self, driver: Any, address: str, *scripts: str) -> None:
        self.driver, self.expected_errors = driver, list[str]()
        added = [
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": f"{{{source}}}"})
            for source in (RECORD, *scripts)
        ]
        driver.get_log("browser")  # drops what the page before left
        driver.get(address)
        for script in added:
            driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
        wait_for(lambda: self.at("speak").is_enabled())
        self.type("key", KEY)

    def at(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def type(self, name: str, keys: str) -> None:
        self.at(name).send_keys(keys)

    def press_ctrl_enter(self) -> None:
        self.type("text", "\ue009\ue007\ue009")  # WebDriver's codes: Ctrl down, Enter, Ctrl up

    def speak(self, text: str, seed: str = "1") -> None:
        self.type("text", text)
        self.type("seed", seed)
        self.press_ctrl_enter()

    def wait_for_status(self, pattern: str) -> None:
        try:
            wait_for(lambda: re.fullmatch(pattern, self.at("status").text))
        except AssertionError:
            raise AssertionError(f"the status is {self.at('status').text!r}, not {pattern!r}") from None

    def played(self) -> list[dict[str, Any]]:
        """Return what reached the AudioContext: for each buffer its samples, start, rate and the time of the call."""
        found: list[dict[str, Any]] = self.driver.execute_script("return window.played")
        return found

    def played_pcm16(self) -> bytes:
        samples = np.concatenate([part["samples"] for part in self.played()]) * 32768
        assert (samples == samples.round()).all()
        return samples.astype("<i2").tobytes()


@pytest.fixture
def open_page(driver: Any, address: str, demo: voxkern.TTS) -> Iterator[Callable[..., Page]]:
    """Return a function that opens the page. At the end, the log must have the expected errors and no others."""
    opened = []

    def open_with(*scripts: str) -> Page:
        opened.append(Page(driver, address, *scripts))
        return opened[-1]

    yield open_with
    assert driver.execute_script("return window.refused") == []
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] != "INFO"]
    patterns = opened[-1].expected_errors
    assert len(errors) == len(patterns), errors
    assert all(re.search(pattern, error) for pattern, error in zip(patterns, errors, strict=True)), errors
    driver.get("about:blank")  # ends what the page still plays or receives
    wait_for(lambda: not demo.engine.n_running)


@pytest.mark.slow
def test_the_sound_is_played_exactly_while_it_arrives(open_page: Callable[..., Page], expected: bytes) -> None:
    page = open_page()
    page.speak(TEXT)
    wait_for(lambda: page.at("speak").text == "Stop")
    page.wait_for_status("Done.*")
    assert page.at("speak").text == "Speak"
    parts = page.played()
    assert page.played_pcm16() == expected
    assert {part["rate"] for part in parts} == {24000}
    (request,) = page.driver.execute_script(
        "return performance.getEntriesByType('resource').filter(({ name }) => name.endsWith('speech'))"
    )
    assert len(parts) > 2
    assert parts[0]["at"] < request["responseEnd"] - 100  # milliseconds
    late = 0
    for part, following in itertools.pairwise(parts):
        gap = round(24000 * (following["when"] - part["when"])) - len(part["samples"])
        assert gap >= 0
        late += gap > 0
    assert page.at("status").text == (f"Done. Pauses before late parts: {late}." if late else "Done.")


@pytest.mark.slow
def test_the_figures_are_the_sounds(open_page: Callable[..., Page], expected: bytes) -> None:
    page = open_page()
    page.speak(TEXT)
    page.wait_for_status("Done.*")
    seconds = len(expected) / 2 / 24000
    assert page.at("length").text == f"{seconds:.2f} s"
    first = float(page.at("first").text.removesuffix(" s"))
    assert 0 < first < float(page.at("factor").text) * seconds + 0.01
    assert page.at("used").text == "1"
    assert page.at("model").text == "tiny · 24 kHz"


@pytest.mark.slow
def test_the_file_is_the_sound(open_page: Callable[..., Page], expected: bytes, tmp_path: Path) -> None:
    page = open_page()
    arguments = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", arguments)
    assert page.at("download").get_attribute("href") is None
    page.speak(TEXT)
    page.wait_for_status("Done.*")
    page.at("download").click()
    file = tmp_path / "voxkern-1.wav"
    wait_for(lambda: file.exists() and file.stat().st_size == 44 + len(expected))
    assert file.read_bytes()[4:8] == (36 + len(expected)).to_bytes(4, "little")
    samples, rate = soundfile.read(file, dtype="int16")
    assert (samples.ndim, rate, samples.tobytes()) == (1, 24000, expected)


@pytest.mark.slow
def test_parts_of_an_odd_number_of_bytes_lose_no_sample(open_page: Callable[..., Page], expected: bytes) -> None:
    page = open_page(SPLIT)
    page.speak(TEXT)
    page.wait_for_status("Done.*")
    assert page.played_pcm16() == expected


@pytest.mark.slow
def test_words_voice_and_steps_reach_the_model(open_page: Callable[..., Page], demo: voxkern.TTS) -> None:
    page = open_page()
    page.type("text", "two")
    page.at("vocabulary").find_element("tag name", "summary").click()
    buttons = page.at("words").find_elements("tag name", "button")
    assert [button.text for button in buttons] == list(WORDS)
    for word in ("monday", "yes"):
        buttons[WORDS.index(word)].click()
    assert page.at("text").get_attribute("value") == "two monday yes"
    assert page.at("count").text == f"14 / {MAX_CHARS}"
    voices = [option.text for option in page.at("voice").find_elements("tag name", "option")]
    assert voices == ["slt", "rms"]  # the default first
    page.type("voice", "rms")
    page.at("steps").clear()
    page.type("steps", "3")
    page.type("seed", str(2**64 - 1))  # more digits than a number of JavaScript has
    page.at("speak").click()
    page.wait_for_status("Done.*")
    assert page.at("used").text == str(2**64 - 1)
    assert page.played_pcm16() == demo.generate("two monday yes", "rms", 2**64 - 1, steps=3).pcm16()


@pytest.mark.slow
def test_a_drawn_seed_is_shown_and_can_be_reused(open_page: Callable[..., Page], demo: voxkern.TTS) -> None:
    page = open_page()
    page.speak("seven", seed="")
    page.wait_for_status("Done.*")
    seed = page.at("used").text
    assert page.played_pcm16() == demo.generate("seven", seed=int(seed)).pcm16()
    page.at("reuse").click()
    assert page.at("seed").get_attribute("value") == seed


@pytest.mark.slow
@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_frees_the_slot(open_page: Callable[..., Page], demo: voxkern.TTS, expected: bytes, by: str) -> None:
    """The sound ends at once, the page offers no file, and the next speech is complete."""
    page = open_page()
    page.speak(LONG)
    wait_for(page.played)
    state = next(iter(demo.engine.running.values()))
    if by == "button":
        page.at("speak").click()
    else:
        page.type("text", "\ue00c")  # WebDriver's code of Escape
    page.wait_for_status("Stopped.")
    assert page.at("speak").text == "Speak"
    wait_for(lambda: demo.engine.n_running == 0)
    assert not state.ended
    assert page.at("download").get_attribute("href") is None
    page.driver.execute_script("window.played = []")
    page.at("text").clear()
    page.type("text", TEXT)
    page.press_ctrl_enter()
    page.wait_for_status("Done.*")
    assert page.played_pcm16() == expected


@pytest.mark.slow
def test_errors_of_the_server_are_shown(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.driver.execute_script("arguments[0].value = arguments[1]", page.at("text"), "x" * 301)
    page.press_ctrl_enter()
    page.wait_for_status(re.escape("input has 301 characters, but this server takes at most 300 (status 400)."))
    assert page.at("speak").text == "Speak"
    page.at("text").clear()
    page.press_ctrl_enter()
    page.wait_for_status("Type a text first.")
    page.at("key").clear()
    page.type("key", "wrong")
    page.speak(TEXT)
    page.wait_for_status("the API key is missing or wrong.*[(]status 401[)].")
    assert page.played() == []
    page.expected_errors = ["status of 400", "status of 401"]


@pytest.mark.slow
def test_a_full_queue_is_shown(open_page: Callable[..., Page], address: str, demo: voxkern.TTS) -> None:
    page = open_page()
    others = {
        "url": f"{address}/v1/audio/speech",
        "json": {"input": LONG, "response_format": "pcm"},
        "headers": {"Authorization": f"Bearer {KEY}"},
        "timeout": 60,
    }
    with httpx.stream("POST", **others), httpx.stream("POST", **others):
        assert demo.engine.n_running == 2
        page.speak(TEXT)
        page.wait_for_status(re.escape("the limit of 0 waiting requests is reached (status 429). Try again in 1 s."))
    page.expected_errors = ["status of 429"]


@pytest.mark.slow
def test_leaving_the_page_frees_the_slot(open_page: Callable[..., Page], demo: voxkern.TTS) -> None:
    page = open_page()
    page.speak(LONG)
    wait_for(page.played)
    state = next(iter(demo.engine.running.values()))
    page.driver.get("data:text/html,elsewhere")
    page.driver.execute_script("window.refused = []")  # this other page has no record
    wait_for(lambda: demo.engine.n_running == 0)
    assert not state.ended


@pytest.mark.slow
def test_a_body_that_ends_early_is_no_complete_sound(open_page: Callable[..., Page]) -> None:
    page = open_page(CUT)
    page.speak(TEXT)
    page.wait_for_status("The sound is incomplete: the server ended it early.")
    wait_for(lambda: page.at("speak").text == "Speak")
    assert page.at("download").get_attribute("href") is None


@pytest.mark.slow
def test_every_control_is_reached_by_tab_and_has_a_name(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.driver.execute_script("arguments[0].focus()", page.at("text"))
    order = []
    for _ in range(7):
        focused = page.driver.switch_to.active_element
        order.append(focused.get_attribute("id") or focused.tag_name)
        assert focused.accessible_name
        assert focused.value_of_css_property("outline-style") == "solid"
        focused.send_keys("\ue004")  # WebDriver's code of Tab
    assert order == ["text", "summary", "voice", "seed", "steps", "key", "speak"]
