"""Chromium, if it is here: opens pages without a network and notes what they say and ask for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
# Text that ends scripts, closes tags, turns direction, or is no text at all.
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!--",
    "<img src=x onerror='window.hacked = 2'>",
    "\"'`\\",
    "&amp;&lt;",
    "\u2028\u2029",
    "\x00\x07\x1b[31m",
    "\ud800",
    "\u202eright\u202c",
    "${1}",
    "]]>",
    "\N{SNOWMAN}\N{VARIATION SELECTOR-16}",
    " plain",
]


def needs_browser(test: Any) -> Any:
    """Marks a test that opens pages: slow, and skipped where there is no Chromium."""
    missing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: no page was opened")
    return pytest.mark.slow(missing(test))


@dataclass
class Opened:
    """A page, and what went on in it."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Opened]:
    """The page in Chromium; ``options`` are of Playwright's ``new_context``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(offline=True, **options).new_page()
        found = Opened(page)

        def hear(message: Any) -> None:
            # What the graphics driver thinks of the machine is not about the page.
            if "GL Driver Message" not in message.text:
                found.said.append(message.text)

        page.on("console", hear)
        page.on("pageerror", lambda error: found.said.append(str(error)))
        page.on(
            "request",
            lambda asked: asked.url.startswith(("file:", "data:")) or found.asked.append(asked.url),
        )
        page.goto(path.as_uri())
        yield found
        browser.close()
