"""The queue's page in a real browser: widths, dark, the keyboard alone, live changes, and no request to elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, Page, sync_playwright

from launch.queue import schema as db
from launch.queue.page import server
from launch.queue.source import Local
from launch.queue.store import event
from launch.ranks.environment import choose_port
from tests.unit import queue_page_world as world

pytestmark = pytest.mark.drill
PATHS = ("/", "/jobs/1", "/jobs/5", "/events", "/api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Local]:
    made = world.make(tmp_path)
    yield made
    made.store.close()


@contextlib.contextmanager
def serving(queue: Local, folder: Path, token: str | None) -> Iterator[str]:
    """Serve the page in a thread; give its URL."""
    listening = server.listen(str(choose_port(None)), token)
    url = server.address_of(listening).rstrip("/")
    running = server.server_of(queue, folder, token, listening)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield url
    finally:
        running.should_exit = True
        thread.join(20)


class Watched:
    """A page whose complaints and requests are noted."""

    def __init__(self, browser: Browser, width: int, scheme: str) -> None:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_fits_and_asks_nobody_else(
    browser: Browser, queue: Local, tmp_path: Path, width: int, scheme: str
) -> None:
    with serving(queue, tmp_path, None) as url:
        seen = Watched(browser, width, scheme)
        for path in PATHS:
            seen.page.goto(url + path)
            seen.page.wait_for_timeout(300)
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= width, path
            assert contrast(seen.page) == [], path
        assert not seen.said
        assert not [asked for asked in seen.asked if not asked.startswith(f"{url}/")]
        back = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(22, 22, 21)") == (scheme == "dark")
        seen.page.context.close()


def contrast(page: Page) -> list[str]:
    """Return the texts whose colour is too close to what is behind them (WCAG 2.2: 4.5 to 1)."""
    return list(
        page.evaluate("""() => {
      const linear = (v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
      const light = (c) => { const [r, g, b] = c.map(linear);
        return .2126 * r + .7152 * g + .0722 * b; };
      const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
      const low = [];
      for (const one of document.querySelectorAll("main *, header *")) {
        if (![...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
        if (!one.checkVisibility() || one.closest("svg")) continue;
        let behind = one;
        while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        const a = light(rgba(getComputedStyle(one).color).slice(0, 3));
        const b = light(rgba(getComputedStyle(behind || document.body).backgroundColor).slice(0, 3));
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        const text = one.textContent.trim().slice(0, 30);
        if (ratio < 4.5) low.push(`${one.className || one.tagName} ${ratio.toFixed(2)} ${text}`);
      }
      return low;
    }""")
    )


def test_changes_show_without_a_reload_and_keep_the_focus(browser: Browser, queue: Local, tmp_path: Path) -> None:
    with serving(queue, tmp_path, None) as url:
        page = Watched(browser, 1280, "light").page
        page.goto(url)
        page.evaluate("window.same = true")
        link = page.locator("#waiting a").first
        link.focus()
        name = link.inner_text()
        with queue.store.write() as connection:
            changed = {"reason": "job 9 goes first", "priority": 77}
            connection.execute(sa.update(db.jobs).where(db.jobs.c.state == "waiting").values(**changed))
            event(connection, "moved", 3)
        page.locator("#waiting >> text=job 9 goes first").first.wait_for(timeout=15_000)
        assert page.evaluate("window.same") is True
        assert page.evaluate("document.activeElement.innerText") == name
        page.goto(f"{url}/jobs/1")
        folder = queue.store.rows(sa.select(db.attempts.c.folder).where(db.attempts.c.job == 1))[0]["folder"]
        with (Path(folder) / "output.log").open("a") as log:
            log.write("a new line\n")
        page.locator("#log >> text=a new line").wait_for(timeout=15_000)
        assert page.evaluate(
            "(l => l.scrollTop + l.clientHeight >= l.scrollHeight - 8)(document.getElementById('log'))"
        )
        page.context.close()


def test_the_keyboard_alone_logs_in_and_cancels(browser: Browser, queue: Local, tmp_path: Path) -> None:
    with serving(queue, tmp_path, world.TOKEN) as url:
        seen = Watched(browser, 1280, "dark")
        page = seen.page
        page.goto(f"{url}/jobs/1")
        assert page.url == f"{url}/login"
        ready(page)
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.locator("text=not the token").wait_for()
        ready(page)
        page.keyboard.type(world.TOKEN)
        page.keyboard.press("Enter")
        page.locator("#waiting").wait_for()
        reached = [focused(page) for _ in range(60) if page.keyboard.press("Tab") is None]
        for wanted in ("Skip to the content", "Overview", "Log out", "Drain", "All events"):
            assert any(wanted in text for text in reached), (wanted, reached)
        page.goto(f"{url}/jobs/1")
        press_on(page, "Cancel")
        press_on(page, "Cancel job 1 for good")
        page.locator("text=job 1 ends once it has saved").wait_for()
        assert queue.store.job(1)["cancelled"]
        assert page.evaluate("document.cookie") == ""
        assert world.TOKEN not in page.content()
        press_on(page, "Log out")
        page.locator("#token").wait_for()
        assert not [line for line in seen.said if "403" not in line]  # the wrong token
        page.context.close()


def ready(page: Page) -> None:
    """Wait until the field of the token has the focus, which a browser gives it after it is seen."""
    page.wait_for_function("document.activeElement.id === 'token'")


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.innerText || ''"))


def press_on(page: Page, name: str) -> None:
    """Go on with the tabulator until something has the focus, and press Enter there; it can be seen."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if focused(page).strip() == name:
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            page.keyboard.press("Enter")
            time.sleep(0.2)
            return
    raise AssertionError(f"the keyboard does not reach {name}")
