"""The dashboard in a real browser, over recorded data: what is shown, at which size, and who may ask."""

from __future__ import annotations

import http.client
import json
import re
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.recorded import NOW_S, Recorded, serving

PHONE = {"width": 390, "height": 844}


def card(page: Page, worker_id: str):  # type: ignore[no-untyped-def]
    return page.locator(f'[data-id="{worker_id}"]')


def test_every_worker_with_pid_epoch_state_and_load(page: Page, url: str, recorded: Recorded) -> None:
    page.goto(f"{url}/dashboard")
    expect(page.locator(".worker")).to_have_count(len(recorded.workers))
    for worker in recorded.workers:
        shown = card(page, worker["id"])
        expect(shown).to_contain_text(str(worker["pid"]))
        expect(shown).to_contain_text(f"1.{worker['epoch'] % (1 << 20)}")
        expect(shown).to_contain_text("healthy")
    expect(card(page, "ew-0")).to_contain_text("rows/s")
    expect(page.locator("#badges")).to_contain_text("240 of 240 experts with a shadow")
    expect(page.locator("#throughput")).to_contain_text(re.compile(r"sent 1\d\d"))
    expect(page.locator("#tbt")).to_contain_text(re.compile(r"median \d+"))


def test_a_death_is_marked_announced_and_logged(page: Page, url: str, recorded: Recorded) -> None:
    page.goto(url)
    expect(card(page, "ew-1")).to_contain_text("healthy")
    recorded.kill("ew-1", 9)
    expect(card(page, "ew-1")).to_contain_text("dead")
    expect(card(page, "ew-1")).to_contain_text(re.compile(r"died at [\d:]+: killed by SIGKILL"))
    expect(page.locator("#said")).to_have_text("ew-1 is dead")
    expect(page.locator("#event-rows tr").first).to_contain_text("ew-1exited")
    expect(page.locator("#throughput .mark")).to_have_count(1)
    expect(page.locator("#links path[data-broken]")).to_have_count(2)
    expect(page.locator("#grid-summary")).to_contain_text("240 without a shadow")
    page.get_by_label("Failures only").check()
    expect(page.locator("#event-rows tr:visible")).to_have_count(2)
    recorded.back("ew-1")
    expect(card(page, "ew-1")).to_contain_text("healthy")
    expect(page.locator("#throughput .mark")).to_have_count(2)
    expect(page.locator("#links path[data-broken]")).to_have_count(0)


def test_kill_drain_and_add_ask_first(page: Page, url: str, recorded: Recorded) -> None:
    page.goto(url)
    page.get_by_role("button", name="Kill ew-0").click()
    page.get_by_role("button", name="Cancel").click()
    assert recorded.asked == []
    page.get_by_role("button", name="Kill ew-0").click()
    page.get_by_label("Signal").select_option("SIGSTOP")
    page.locator("#ask-yes").click()
    expect(page.locator("#said")).to_contain_text("ew-0")
    page.get_by_role("button", name="Drain aw-1").click()
    page.locator("#ask-yes").click()
    expect(card(page, "aw-1")).to_contain_text("draining")
    page.get_by_role("button", name="Add expert worker").click()
    page.locator("#ask-yes").click()
    expect(card(page, "ew-2")).to_contain_text("starting")
    assert recorded.asked == [("kill", "ew-0", "19"), ("drain", "aw-1"), ("add", "expert")]


def test_all_of_it_works_from_the_keyboard(page: Page, url: str, recorded: Recorded) -> None:
    page.goto(url)
    page.get_by_role("button", name="Kill aw-0").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#ask")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#ask")).not_to_be_visible()
    expect(page.get_by_role("button", name="Kill aw-0")).to_be_focused()
    page.locator("#grid").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#grid-cell")).to_have_text(re.compile(r"Layer 1, expert 1: ew-\d, shadow on ew-\d"))
    page.locator("#throughput .plot").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#throughput .cursor")).to_have_count(1)


ADMIN_KEY = "the-admin-key-0123456789"


def test_a_link_brings_the_key_and_the_address_forgets_it(
    page: Page, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARRAGON_ADMIN_KEY", ADMIN_KEY)
    with serving(recorded) as url:
        page.goto(f"{url}/#key={ADMIN_KEY}")
        expect(card(page, "ew-0")).to_contain_text("healthy")
        assert page.url == f"{url}/"
        assert ADMIN_KEY not in page.content()
        page.get_by_role("button", name="Kill ew-0").click()
        page.locator("#ask-yes").click()
        expect(page.locator("#said")).to_contain_text("ew-0")
        page.reload()
        expect(card(page, "ew-1")).to_contain_text("healthy")
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie").count(ADMIN_KEY) == 0


def test_without_the_key_the_page_asks_for_it(
    browser: Browser, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARRAGON_ADMIN_KEY", ADMIN_KEY)
    with serving(recorded) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#ask-title")).to_have_text("Admin key")
        expect(page.locator(".worker")).to_have_count(0)
        page.locator("#ask-key input").fill(ADMIN_KEY)
        page.locator("#ask-yes").click()
        expect(card(page, "ew-0")).to_contain_text("healthy")
        context.close()


def test_the_page_says_that_nobody_answers_and_comes_back_by_itself(page: Page, recorded: Recorded) -> None:
    with serving(recorded) as url:
        page.goto(url)
        expect(card(page, "ew-0")).to_contain_text("healthy")
    expect(page.get_by_text("The orchestrator does not answer")).to_be_visible()
    recorded.workers[0]["pid"] = 777_777
    with serving(recorded, urlsplit(url).port or 0):
        expect(card(page, recorded.workers[0]["id"])).to_contain_text("777777")
        expect(page.get_by_text("The orchestrator does not answer")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", [(2, 2, 30, 8), (4, 8, 60, 128)])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}])
def test_readable_on_a_phone_and_on_a_desk(
    browser: Browser, size: dict[str, int], shape: tuple[int, int, int, int], scheme: str
) -> None:
    attention, expert, layers, experts = shape
    recorded = Recorded(attention=attention, expert=expert, layers=layers, experts=experts)
    with serving(recorded) as url:
        context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(url)
        expect(card(page, "ew-1")).to_be_visible()
        expect(page.locator("#grid-summary")).to_contain_text(f"{layers} layers × {experts} experts")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        spilt = (
            "[...document.querySelectorAll('.worker')].filter(w => w.scrollWidth > w.clientWidth + 1).length"
        )
        assert page.evaluate(spilt) == 0, "a card's text leaves its card"
        grid = page.locator("#grid").bounding_box()
        assert grid is not None
        assert grid["width"] * grid["height"] >= layers * experts * 25, "cells of five pixels at least"
        low = page.evaluate(CONTRAST)
        assert low == [], f"text with too little contrast in {scheme}"
        small = page.evaluate(
            "[...document.querySelectorAll('button,select')]"
            ".filter(b => b.offsetParent && b.offsetHeight < 24).length"
        )
        assert small == 0, "a finger needs 24 pixels"
        context.close()


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.checkVisibility() || node.disabled || node.closest("svg, .unseen, .skip")) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${node.tagName} ${node.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


def test_the_theme_can_be_chosen_and_is_kept(page: Page, url: str) -> None:
    page.goto(url)
    background = "getComputedStyle(document.body).backgroundColor"
    shown = []
    for name in ("light", "dark"):
        page.get_by_role("button", name="Theme").click()
        expect(page.locator("#theme")).to_have_text(f"Theme: {name}")
        shown.append(page.evaluate(background))
    assert shown[0] != shown[1]
    page.reload()
    assert page.evaluate(background) == shown[1]


def test_controls_have_names_and_headings_have_an_order(page: Page, url: str) -> None:
    page.goto(url)
    expect(card(page, "ew-0")).to_be_visible()
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, select, input, canvas, svg.plot, [role=region]")]
           .filter((n) => n.checkVisibility() && !(n.ariaLabel || n.textContent.trim() || n.labels?.length))
           .map((n) => n.outerHTML)"""
    )
    assert unnamed == []
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].filter(h => h.offsetParent).map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_text_from_a_worker_stays_text(page: Page, url: str, recorded: Recorded) -> None:
    recorded.note("dead", "ew-1", "<img src=x onerror=alert(1)><script>document.title='no'</script>", NOW_S)
    page.goto(url)
    expect(page.locator("#event-rows tr").first).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.title() == "Tarragon"
    assert page.locator("#event-rows img").count() == 0


# ------------------------------------------------------------------ who may ask (no browser needed)


def ask(url: str, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    body = json.dumps({"worker_id": "ew-0"}) if method == "POST" else None
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json", **names})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_nothing_comes_from_elsewhere_and_nobody_may_frame_it(url: str) -> None:
    for path in ("/", "/dashboard", "/dashboard/main.js", "/dashboard/dashboard.css", "/dashboard/icon.svg"):
        status, headers, body = ask(url, "GET", path)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert not re.search(rb"(src|href)=.?https?:|import .*https?:|url\(", body)
        assert b"style=" not in body


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/dashboard/../config.py", "/dashboard/__init__.py", "/dashboard/%2e%2e/x"]
)
def test_only_what_is_listed_is_served(url: str, path: str) -> None:
    assert ask(url, "GET", path)[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Origin": "null"},
    ],
)
def test_a_foreign_page_neither_reads_nor_kills(
    url: str, recorded: Recorded, headers: dict[str, str]
) -> None:
    for method, path in (("POST", "/kill"), ("GET", "/status"), ("GET", "/history")):
        assert ask(url, method, path, **headers)[0] == 403
    assert recorded.asked == []


KILL = """(url) => Promise.all(["application/json", "text/plain"].map((type) => fetch(url + "/kill", {
  method: "POST", mode: type === "text/plain" ? "no-cors" : "cors", headers: { "Content-Type": type },
  body: JSON.stringify({ worker_id: "ew-0" }),
}).then((answer) => answer.status, () => "refused")))"""


def test_a_foreign_page_in_a_real_browser_cannot_kill(browser: Browser, url: str, recorded: Recorded) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.route("http://elsewhere.test/", lambda route: route.fulfill(body="hello", content_type="text/html"))
    tab.goto("http://elsewhere.test/")
    outcome = tab.evaluate(KILL, url)
    assert outcome[0] == "refused", "the browser asks before it sends JSON elsewhere"
    assert outcome[1] in (0, "refused"), "what it sends without asking is answered, opaquely, with a refusal"
    assert recorded.asked == []
    tab.goto(url)
    assert tab.evaluate(KILL, url) == [202, 415]
    assert recorded.asked == [("kill", "ew-0", "9")], "and the same from our own page works"
    context.close()


def test_the_page_itself_and_programs_may(url: str, recorded: Recorded) -> None:
    assert ask(url, "POST", "/kill")[0] == 202
    assert ask(url, "POST", "/drain", Origin=url, Sec_Fetch_Site="same-origin")[0] == 202
    assert ask(url, "GET", "/dashboard", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert recorded.asked == [("kill", "ew-0", "9"), ("drain", "ew-0")]
