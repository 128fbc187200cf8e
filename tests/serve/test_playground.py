"""The playground in a real browser, before a real server: nothing is drawn that the server did not say.

`page` fails every test in which a request leaves the server, a script throws or the console complains.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from open_page import CHROMIUM, LONG_SECONDS, Site, codec_of, missing
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from starlette.testclient import TestClient
from stub_backend import HOME, Server, clip, picture

from sora_train.errors import UserError
from sora_train.serving.jobs.job import Asked

HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>&amp;"
)
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 860}
expect.set_options(timeout=1000 * LONG_SECONDS)
OPERATIONS = ("new", "storyboard", "edit", "extend", "remix", "loop", "connect", "infill", "upscale")  # fmt: skip
FIND_NAMELESS = """() => [...document.querySelectorAll("input, select, textarea, button, video, progress, a")]
  .filter((e) => !(e.labels?.length || e.ariaLabel || e.hasAttribute("aria-labelledby") || e.textContent.trim()))
  .map((e) => e.outerHTML)"""
FIND_FAINT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const under = (e) => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255]; };
  const faint = [];
  for (const e of document.querySelectorAll("body *")) {
    const says = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!says || !e.checkVisibility() || e.matches(":disabled, option, .unseen, .skip")) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(under(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${e.outerHTML.slice(0, 100)}`);
  }
  return faint;
}"""


def in_browser(test: Callable) -> Callable:
    """A test that needs a browser."""
    skip = pytest.mark.skipif(bool(missing()), reason=missing() or "a browser is here")
    return pytest.mark.slow(skip(test))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path).running() as running:
        yield running
        running.backend.go(100)


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK)
    page, wrong = context.new_page(), []

    def requested(url: str) -> None:
        if not url.startswith((site.home, f"blob:{site.home}")):
            wrong.append(f"asked {url}")

    def said(kind: str, text: str) -> None:
        # Chromium itself writes a line for every refusal and lost connection.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource: "):
            wrong.append(text)

    page.on("request", lambda request: requested(request.url))
    page.on("console", lambda message: said(message.type, message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(site.home)
    yield page
    context.close()
    assert not wrong, wrong


def make(page: Page, site: Site, prompt: str = "A ring turns.", **fields: str) -> Locator:
    """The card of a finished video, made in the page."""
    page.locator("#more").evaluate("(e) => (e.open = true)")
    for name, text in {"prompt": prompt, "seconds": "2", **fields}.items():
        page.locator(f"#{name}").fill(text)
    sent(page)
    site.backend.go()
    return finished(page)


def finished(page: Page) -> Locator:
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-status", "completed")
    return card


def sent(page: Page) -> None:
    """Press the button and wait for the card."""
    count = page.locator(".card").count()
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator(".card")).to_have_count(count + 1)


def tab_to(page: Page, target: Locator) -> None:
    for _ in range(80):
        if target.evaluate("(e) => e === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError("the keyboard does not get there")


def error_of(page: Page, param: str) -> Locator:
    return page.locator(f'[data-param="{param}"] > .error')


def image_file(name: str = "first.png") -> dict:
    return {"name": name, "mimeType": "image/png", "buffer": picture()}


# --- making ---


@in_browser
def test_a_video_is_made_and_played_with_the_keyboard_alone(page: Page, site: Site):
    tab_to(page, page.get_by_label("Prompt"))
    page.keyboard.type("A ring turns.")
    tab_to(page, page.get_by_label("Length in seconds"))
    page.keyboard.type("2")
    tab_to(page, page.get_by_role("button", name="Make the video"))
    page.keyboard.press("Enter")
    card, bar = page.locator(".card"), page.get_by_role("progressbar", name="A ring turns.")
    site.backend.go(2)
    expect(card).to_contain_text("50 %")
    assert bar.evaluate("(e) => e.value") == 50
    expect(page.get_by_role("status")).to_have_text("50 percent: A ring turns.")
    site.backend.go(2)
    finished(page)
    expect(page.get_by_role("status")).to_have_text("Finished: A ring turns.")
    tab_to(page, page.get_by_role("button", name="Play: A ring turns."))
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.screen video')?.currentTime > 0.3")
    shown = card.locator("video").evaluate("(e) => [e.videoWidth, e.videoHeight, e.duration]")
    assert shown == [64, 48, 2]
    with page.expect_download() as download:
        card.get_by_role("button", name="Download").press("Enter")
    assert download.value.suggested_filename == f"{site.jobs()[0].id}.mp4"
    assert codec_of(download.value.path()) == "h264"


@in_browser
def test_a_card_shows_what_the_server_measured(page: Page, site: Site):
    card = make(page, site, seed="5")
    facts = "2 s · 64 × 48 · 8 frames a second · seed 5 · tiny · from words"
    expect(card.locator(".facts")).to_have_text(facts)
    expect(card.locator(".badge")).to_have_text(["$0.20 for 2 s", "Signed", "Watermarked"])
    card.get_by_role("link", name="Signed").click()
    expect(page.locator("#verify pre")).to_be_visible()


@in_browser
def test_fields_are_sent_and_parts_become_sentences(page: Page, site: Site):
    page.get_by_label("Prompt").fill("A ring turns")
    page.get_by_text("Describe it part by part").click()
    page.get_by_label("Camera").fill("static camera")
    page.get_by_label("Setting").fill("On a dark table.")
    page.get_by_text("More", exact=True).click()
    values = {"negative_prompt": "blur", "seed": "3", "steps": "7", "guidance_scale": "2.5", "fps": "8"}  # fmt: skip
    for name, text in values.items():
        page.locator(f"#{name}").fill(text)
    page.locator("#size").fill("32x48")
    sent(page)
    asked = site.jobs()[0].asked
    assert asked.prompt == "A ring turns. On a dark table. static camera."
    assert (asked.seed, asked.steps, asked.guidance_scale, asked.fps) == (3, 7, 2.5, 8)
    assert asked.negative_prompt == "blur" and asked.size == (32, 48)


@in_browser
@pytest.mark.parametrize("way", ["chosen", "dropped"])
def test_an_image_is_uploaded(page: Page, site: Site, way: str):
    given = image_file(HOSTILE)
    if way == "chosen":
        page.get_by_label("First image").set_input_files([given])
    else:
        drop = """(slot, bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "first.png", { type: "image/png" }));
          slot.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
        page.locator('.drop[data-param="image"]').evaluate(drop, [*given["buffer"]])
    page.wait_for_function("() => document.querySelector('.shown img')?.naturalWidth === 64")
    card = make(page, site)
    expect(card.locator(".facts")).to_contain_text("from images")
    assert site.jobs()[0].asked.sampling_op == "i2v"
    (path,) = site.backend.inputs
    assert [upload.kind for upload in site.jobs()[0].asked.uploads] == ["image"], path
    page.get_by_role("button", name=re.compile("^Remove")).press("Enter")
    expect(page.locator(".shown img")).to_have_count(0)


@in_browser
def test_a_file_of_another_kind_is_refused_at_its_field(page: Page):
    page.get_by_label("First image").set_input_files([{**image_file("a.txt"), "mimeType": "text/plain"}])  # fmt: skip
    expect(error_of(page, "image")).to_have_text("This is no image: a.txt")


@in_browser
def test_a_finished_video_is_extended_remixed_and_edited(page: Page, site: Site):
    make(page, site)
    source = site.jobs()[0]
    page.get_by_role("button", name="Extend").click()
    expect(page.locator("#source")).to_have_text("A ring turns.")
    assert page.evaluate("() => document.activeElement.id") == "prompt"
    card = make(page, site, "It stops.", seconds="1")
    longer = site.jobs()[0].asked
    assert (longer.op, longer.source, longer.source_seconds) == ("extend", source.id, 2)
    expect(card.locator(".facts")).to_contain_text("3 s")
    expect(card.locator(".badge").first).to_have_text("$0.10 for 1 s")
    for name, op in (("Remix", "remix"), ("Edit", "edit")):
        page.locator(".card").last.get_by_role("button", name=name).click()
        page.get_by_label("Prompt").fill("A square turns.")
        sent(page)
        other = site.jobs()[0].asked
        assert (other.op, other.source, other.prompt) == (op, source.id, "A square turns.")


@in_browser
@pytest.mark.parametrize(
    ("operation", "fields", "count"),
    [
        ("edit", {"strength": "0.5"}, 1),
        ("extend", {"seconds": "1"}, 1),
        ("loop", {}, 1),
        ("connect", {}, 2),
        ("infill", {"gap": "5:13"}, 1),
        ("upscale", {"size": "128x96"}, 1),
    ],
)
def test_clips_are_uploaded(page: Page, site: Site, operation: str, fields: dict, count: int):
    page.get_by_label("Make", exact=True).select_option(operation)
    page.get_by_label("Prompt").fill("A ring turns.")
    page.get_by_text("More", exact=True).click()
    for label in ("Video", "Second video")[:count]:
        given = {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": clip()}
        page.get_by_label(label, exact=True).set_input_files([given])
    for name, text in fields.items():
        page.locator(f"#{name}").fill(text)
    sent(page)
    asked = site.jobs()[0].asked
    assert asked.sampling_op == operation
    assert [upload.kind for upload in asked.uploads] == count * ["video"]


@in_browser
def test_what_needs_a_video_says_so(page: Page):
    for operation, param in (("remix", "source"), ("edit", "video")):
        page.get_by_label("Make", exact=True).select_option(operation)
        page.get_by_role("button", name="Make the video").click()
        expect(error_of(page, param)).to_contain_text("Choose a")


# --- the storyboard ---


@in_browser
def test_a_storyboard_is_written_with_the_keyboard(page: Page, site: Site):
    page.get_by_label("Make", exact=True).select_option("storyboard")
    rows = page.locator("#board > li")
    for number, words in enumerate(("one", "two")):
        rows.nth(number).get_by_label("Words").fill(words)
    page.get_by_role("button", name="Add a row").press("Enter")
    page.keyboard.type("three")
    expect(rows.nth(2).get_by_label("At second")).to_have_value("2")
    rows.nth(2).get_by_label("Image").set_input_files([image_file()])
    page.get_by_role("button", name="Earlier: row 3").press("Enter")
    assert (
        page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Earlier: row 2"
    )
    expect(page.get_by_role("status")).to_have_text("Moved to second 1, row 2 of 3.")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Remove: row 2").press("Enter")
    rows.nth(1).get_by_label("At second").fill("1.5")
    page.get_by_label("Length in seconds").fill("3")
    sent(page)
    job = site.jobs()[0]
    folder = f"inputs/{job.id}"
    assert job.asked.storyboard == [
        {"at": 0, "prompt": "three", "image": f"{folder}/cue_0.png"},
        {"at": 1.5, "prompt": "two"},
    ]
    assert job.asked.prompt == "three; two"


# --- what goes wrong ---


@in_browser
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"size": "wide"}, "size"),
        ({"seconds": "4000"}, "seconds"),
        ({"seed": "-1"}, "seed"),
        ({"guidance_scale": "13"}, "guidance_scale"),
        ({"adapters": "nothing"}, "adapters"),
    ],
)
def test_an_error_stands_beside_the_field_it_names(page: Page, fields: dict, param: str):
    page.get_by_text("More", exact=True).click()
    for name, text in {"prompt": "A ring turns.", **fields}.items():
        page.locator(f"#{name}").fill(text)
    page.get_by_text("More", exact=True).click()
    page.get_by_role("button", name="Make the video").click()
    error, field = error_of(page, param), page.locator(f"#{param}")
    expect(error).to_be_visible()
    expect(field).to_be_focused()
    expect(field).to_have_accessible_description(error.inner_text())
    field.fill("4" if param != "size" else "64x48")
    page.get_by_role("button", name="Make the video").click()
    expect(error).to_have_count(0 if param != "adapters" else 1)


@in_browser
def test_errors_of_a_storyboard_stand_in_their_row(page: Page):
    page.get_by_label("Make", exact=True).select_option("storyboard")
    rows = page.locator("#board > li")
    rows.nth(0).get_by_label("Words").fill("one")
    rows.nth(1).get_by_label("Words").fill("two")
    rows.nth(1).get_by_label("At second").fill("soon")
    page.get_by_role("button", name="Make the video").click()
    expect(error_of(page, "storyboard[1].at")).to_be_visible()
    expect(rows.nth(1).get_by_label("At second")).to_be_focused()
    rows.nth(1).get_by_label("At second").fill("1")
    rows.nth(1).get_by_label("Words").fill("")
    page.get_by_role("button", name="Make the video").click()
    expect(error_of(page, "storyboard[1]")).to_contain_text("a cue has a prompt")


@in_browser
def test_a_failed_video_says_why_and_its_words_are_taken_again(page: Page, site: Site):
    site.backend.fail = UserError(f"cannot make {HOSTILE}")
    page.get_by_label("Prompt").fill("A ring turns.")
    sent(page)
    site.backend.go()
    card = page.locator(".card")
    expect(card.locator(".screen")).to_have_text(f"Cannot make {HOSTILE}.")
    expect(card).to_contain_text("Not billed")
    page.get_by_label("Prompt").fill("")
    card.get_by_role("button", name="Try these words again").click()
    expect(page.get_by_label("Prompt")).to_have_value("A ring turns.")


@in_browser
def test_a_hostile_prompt_is_text(page: Page, site: Site):
    card = make(page, site, HOSTILE)
    expect(card.locator(".prompt")).to_have_text(HOSTILE)
    assert card.locator("script, .prompt *").count() == 0
    card.get_by_role("button", name="Remix").click()
    expect(page.locator("#source")).to_have_text(HOSTILE)
    assert page.title() == "sora_train: playground"


@in_browser
def test_a_lost_connection_loses_nothing(page: Page, site: Site):
    lost = page.get_by_text("The connection is lost.")
    page.get_by_label("Prompt").fill("A ring turns.")
    sent(page)
    page.context.set_offline(True)
    expect(lost).to_be_visible()
    site.backend.go()
    page.context.set_offline(False)
    finished(page)
    expect(lost).to_be_hidden()


@in_browser
def test_an_answer_that_is_lost_makes_no_second_video(page: Page, site: Site):
    answers: list[int] = []

    def lose_first(route: Route) -> None:
        answers.append(route.fetch().status)
        if len(answers) == 1:
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/v1/videos", lose_first)
    page.get_by_label("Prompt").fill("A ring turns.")
    sent(page)
    assert answers == [200, 200] and len(site.jobs()) == 1


@in_browser
def test_work_is_cancelled_and_videos_are_deleted(page: Page, site: Site):
    page.get_by_label("Prompt").fill("A ring turns.")
    sent(page)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#empty")).to_be_visible()
    assert site.jobs() == []
    site.backend.go()  # the worker notices it between two steps
    card = make(page, site)
    card.get_by_role("button", name="Delete").press("Enter")
    assert len(site.jobs()) == 1
    card.get_by_role("button", name="Really delete?").press("Enter")
    expect(page.locator(".card")).to_have_count(0)
    assert site.jobs() == []


# --- the gallery ---


@in_browser
def test_the_filmstrip_shows_the_frames_and_moves_the_player(page: Page, site: Site):
    card = make(page, site, size="128x96")
    page.wait_for_function("() => document.querySelector('.strip canvas').width > 300")
    ends = """(canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const discs = [];
      for (let i = 0; i < data.length; i += 4) {
        if (data[i] > 200 && data[i + 2] < 170) discs.push((i / 4) % canvas.width / canvas.width);
      }
      return [discs.reduce((a, b) => Math.min(a, b)), discs.reduce((a, b) => Math.max(a, b))];
    }"""
    # The disc is on the left at first and on the right at last, so it is near both ends of the strip.
    first, last = card.locator("canvas").evaluate(ends)
    assert first < 0.06 and last > 0.94
    card.get_by_label("Filmstrip: choose a moment").press("End")
    page.wait_for_function("() => document.querySelector('.screen video')?.currentTime === 2")


@in_browser
def test_what_is_made_elsewhere_appears_and_what_plays_goes_on(page: Page, site: Site):
    card = make(page, site)
    card.get_by_role("button", name="Play: A ring turns.").click()
    page.wait_for_function("() => document.querySelector('.screen video')?.currentTime > 0.1")
    page.request.post(f"{site.home}v1/videos", data={"prompt": "made elsewhere"})
    page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator(".prompt")).to_have_text(["made elsewhere", "A ring turns."])
    expect(page.locator(".screen video")).to_have_count(1)


@in_browser
def test_older_videos_come_page_by_page(page: Page, site: Site):
    site.worker.stop.set()
    site.threads[1].join()
    for number in range(15):
        site.service.store.create("local", Asked("create", f"ring {number}", "tiny", 1, (64, 48)))
        lease = site.service.store.claim("test", lease_seconds=60)
        site.service.store.fail(lease, code="server_error", message="never made")
    page.reload()
    expect(page.locator(".card")).to_have_count(12)
    page.get_by_role("button", name="Older videos").press("Enter")
    expect(page.locator(".card")).to_have_count(15)
    expected = [f"ring {number}" for number in reversed(range(15))]
    expect(page.locator(".prompt")).to_have_text(expected)
    expect(page.get_by_role("button", name="Older videos")).to_be_hidden()


# --- the key ---


@in_browser
def test_a_key_is_asked_for_kept_in_the_tab_and_sent(page: Page, site: Site, browser: Browser):
    _, secret = site.service.keys.add("test")
    page.reload()
    field = page.get_by_label("API key", exact=True).and_(page.locator("input"))
    expect(field).to_be_focused()
    field.fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key .error")).to_be_visible()
    field.fill("schlüssel")
    page.keyboard.press("Enter")
    expect(page.locator("#key .error")).to_contain_text("no spaces")
    field.fill(secret)
    page.keyboard.press("Enter")
    expect(page.locator("#empty")).to_be_visible()
    card = make(page, site)
    card.get_by_role("button", name="Play: A ring turns.").click()
    page.wait_for_function("() => document.querySelector('.screen video')?.currentTime > 0.1")
    page.wait_for_function("() => document.querySelector('.strip canvas').width > 300")
    assert page.evaluate("() => Object.values(sessionStorage)") == [secret]
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    assert page.context.cookies() == []
    page.get_by_role("button", name="API key").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator(".card")).to_have_count(0)
    assert page.evaluate("() => sessionStorage.length") == 0


# --- for everybody ---


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_and_named_throughout(page: Page, site: Site, scheme: str):
    page.emulate_media(color_scheme=scheme)
    make(page, site, f"{'long' * 60} {HOSTILE}", seed="9223372036854775807")
    site.backend.fail = UserError("x" * 300)
    make_failed = page.get_by_role("button", name="Make the video")
    make_failed.click()
    site.backend.go()
    expect(page.locator(".card").first).to_have_attribute("data-status", "failed")
    sent(page)
    page.set_viewport_size(PHONE)
    for details in page.locator("details").all():
        details.evaluate("(e) => (e.open = true)")
    for operation in OPERATIONS:
        page.get_by_label("Make", exact=True).select_option(operation)
        if operation == "remix":
            page.get_by_role("button", name="Make the video").click()
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360, operation
        assert page.evaluate(FIND_NAMELESS) == []
        assert page.evaluate(FIND_FAINT) == []


# --- the files ---


def test_the_page_may_run_nothing_but_its_own_files(tmp_path: Path):
    http = TestClient(Server(tmp_path).app, base_url=HOME)
    page = http.get("/")
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'"
    assert "unsafe" not in str(rules) and rules["frame-ancestors"] == "'none'"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|https?://|//", page.text)
    for name in re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text):
        part = http.get(f"/{name}")
        assert part.status_code == 200 and part.headers["x-content-type-options"] == "nosniff"
        again = http.get(f"/{name}", headers={"if-none-match": part.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for name in ("page.py", "../page.py", "%2e%2e%2fpage.py", "style.css%00"):
        assert http.get(f"/playground/{name}").json()["error"]["code"] == "not_found"
    assert "/playground/{name}" not in json.dumps(http.get("/openapi.json").json())
