"""The page of a real tiny run in headless Chromium: no console message, nothing fetched, pictures that have a size."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest

from alignment.report.render import write_page, write_report
from tests.stages import run, write_project

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
POLICY = '<meta http-equiv="Content-Security-Policy"'  # forbids scripts and requests; breaking it is a console message
MEASURE = """<script>
addEventListener("load", () => document.body.setAttribute("data-found", JSON.stringify({
    pictures: [...document.images].map((image) => [image.naturalWidth, image.clientWidth, image.clientHeight]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth})));
</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


def open_page(path, profile, width=1280):
    """(messages of the console, document as it then stands) of a page."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=10000",
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A real run, one of which an answer tries to be markup; and one that differs only in its seed and an alert."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    status, shown = run(folder, "ppo", "--max_steps", 2)
    assert status == 0, shown
    first, second = folder / "ppo", folder / "ppo_again"
    samples = first / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[0]["answer"] = '</div><script>console.error("from an answer")</script><img src="http://127.0.0.1:9/x">'
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("checkpoint-*"))
    record = json.loads((second / "run.json").read_text())
    record["arguments"] |= {"seed": 4, "data_seed": 4}
    (second / "run.json").write_text(json.dumps(record))
    (second / "alerts.jsonl").write_text('{"step": 1, "alert": "kl", "message": "<script>alert(1)</script>"}\n')
    return [first, second]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    return {"one": write_report(runs[0]), "two": write_page(runs, tmp_path_factory.mktemp("pages") / "two.html")}


@pytest.mark.parametrize(("name", "expected"), [("one", 15), ("two", 13)])
def test_page(pages, name, expected, tmp_path):
    messages, document = open_page(pages[name], tmp_path / "profile")
    assert messages == []
    assert "&lt;script&gt;" in document and "<script" not in document  # an answer is text
    assert document.count("<img ") == expected  # of metrics and samples of a real run

    text = pages[name].read_text()
    measured = tmp_path / "measured.html"
    measured.write_text(re.sub(f"{POLICY}[^>]*>", "", text).replace("</body>", MEASURE))
    for width in (1280, 500):  # a laptop; the narrowest that headless Chromium has
        messages, document = open_page(measured, tmp_path / "profile", width)
        found = json.loads(re.search(r'data-found="([^"]*)"', document)[1].replace("&quot;", '"'))
        assert messages == [] and found["overflow"] <= 0  # nothing is wider than the window
        assert len(found["pictures"]) == expected
        for natural, shown_width, shown_height in found["pictures"]:
            assert natural > 700 and shown_width > 350 and shown_height > 180


def test_a_page_that_fetches_or_runs_something_would_be_noticed(pages, tmp_path):
    """The check above can fail: Chromium reports what the page's policy forbids, and asks no server for it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/x.png"
    page = tmp_path / "page.html"
    page.write_text(pages["one"].read_text().replace("</body>", f'<img src="{address}"><script>1</script></body>'))
    messages, _ = open_page(page, tmp_path / "profile")
    assert len(messages) == 2 and all("Content Security Policy" in message for message in messages) and not asked
    page.write_text(re.sub(f"{POLICY}[^>]*>", "", page.read_text()))
    open_page(page, tmp_path / "profile")
    server.shutdown()
    assert asked == ["/x.png"]
