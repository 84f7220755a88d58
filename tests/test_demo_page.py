"""The page of the demo in a browser, with real clicks; ten users at once; uploads that a browser would not send."""

import base64
import importlib
import io
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image

from perceptio import PerceptioPipeline, load_picture
from perceptio.cli import UNTRAINED, build_parser, main, open_pipeline

pytest.importorskip("gradio", reason='gradio is not installed: pip install "perceptio[demo]" (Pillow 12)')
client, httpx = importlib.import_module("gradio_client"), importlib.import_module("httpx")
demo = importlib.import_module("perceptio.demo.page")
EXAMPLES = demo.EXAMPLES

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, [tabindex="0"]')]
  .filter((one) => one.checkVisibility() && !(one.innerText || one.ariaLabel || one.title || one.labels?.length))
  .map((one) => one.outerHTML)"""
# WCAG's contrast of each visible text with the nearest background that is not transparent.
PALE = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => { const [r, g, b] = parse(colour).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = (one) => { while (one) { const found = getComputedStyle(one).backgroundColor;
    if ((parse(found)[3] ?? 1) > 0.5) return found; one = one.parentElement } return 'rgb(255, 255, 255)' };
  const words = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  return [...document.querySelectorAll('main *')].filter((one) => one.checkVisibility() && words(one)).map((one) => {
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 120)];
  }).filter(([contrast]) => contrast < 4.5) }"""


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    """Gives a mask however little its random weights believe in one."""
    opened = open_pipeline(build_parser().parse_args(["demo", "--model", str(tiny_folder()), "--device", "cpu"]))
    pipe = PerceptioPipeline(model=opened.model, processor=opened.processor, object_threshold=0.0)
    pipe.model.generation_config.max_new_tokens = 24
    return pipe


@pytest.fixture(scope="module")
def address(pipe):
    page = demo.build_page(pipe)
    yield demo.serve(page, wait=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """visit(…) opens the page; in the end nothing must have gone wrong on it, and nothing have left this machine."""
    contexts, faults = [], []

    def visit(viewport=DESKTOP, **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        local = (address, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(local) or faults.append(request.url))
        page.goto(address)
        page.wait_for_selector("#examples button")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults


def take_example(page, name: str) -> None:
    with answered(page):
        page.get_by_role("button", name=EXAMPLES[name]).click()


@contextmanager
def answered(page):
    """Returns when what was asked inside is answered, and not because something before it was."""
    page.evaluate("document.querySelector('.progress').textContent = ''")
    yield
    page.wait_for_function("document.querySelector('.progress').textContent.startsWith('Done')")


def test_an_example_shows_mask_depth_and_answer_and_a_click_reads_the_depth(visit, pipe):
    page = visit()
    take_example(page, "cups.jpg")
    expected = pipe(image=load_picture(demo.HERE / "examples" / "cups.jpg"), text=EXAMPLES["cups.jpg"])
    assert page.locator(".answer").text_content() == expected["generated_text"]
    assert UNTRAINED in page.locator("header").inner_text()
    written = page.locator(".tokens span").all_text_contents()
    assert written == ["[SEG]", "<d_start>", *map(str, expected["depth_codes"]), "<d_end>", expected["generated_text"]]
    box = page.locator(".scene").bounding_box()
    page.locator(".scene").click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.75})
    depth = expected["predicted_depth"]
    at = depth[int(0.75 * depth.shape[0]), int(0.25 * depth.shape[1])].item()
    read = page.locator(".reading").inner_text()
    assert read.endswith("at 25 % from the left, 75 % from the top.")
    assert abs(float(read.split()[1]) - at) < 0.03  # a click falls on whole pixels, and this map is steep
    assert page.locator(".masked").is_visible()
    page.get_by_label("Mask", exact=True).uncheck()
    assert page.locator(".masked").is_hidden() and page.locator(".photo").is_visible()


def test_the_grid_fills_before_the_answer(visit):
    page = visit()
    page.evaluate(
        "() => { window.filled = new Set(); const grid = document.querySelector('.grid');"
        "new MutationObserver(() => filled.add(grid.childElementCount)).observe(grid, { childList: true }) }"
    )
    take_example(page, "house.jpg")
    assert 9 in page.evaluate("[...filled]") and page.locator(".grid").is_hidden()


def test_by_keyboard_alone(visit):
    page = visit()
    take_example(page, "cups.jpg")
    page.locator("#question textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("And now?")
    with answered(page):
        page.keyboard.press("Enter")
    page.locator(".scene").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowUp")
    assert "at 52 % from the left, 40 % from the top" in page.locator(".reading").inner_text()
    page.keyboard.press("Tab")
    line = page.locator(".between input")
    assert line.evaluate("(one) => one === document.activeElement")
    page.keyboard.press("End")
    assert page.locator(".depth").evaluate("(one) => one.style.clipPath") == "inset(0px 0px 0px 100%)"
    assert line.get_attribute("aria-valuetext") == "100 % photo, 0 % depth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    take_example(page, "balls.jpg")
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("[...document.images].filter((one) => !one.alt && one.ariaHidden !== 'true').length") == 0
    assert page.evaluate(PALE) == []


def test_on_a_phone_nothing_sticks_out_and_the_result_comes_into_sight(visit):
    page = visit(PHONE, is_mobile=True, has_touch=True, reduced_motion="reduce")
    take_example(page, "corridor.jpg")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert 0 <= page.locator(".scene").bounding_box()["y"] < PHONE["height"] / 2
    page.locator(".scene").tap()
    assert page.locator(".reading").inner_text().startswith("Depth 0.")
    small = page.locator("#ask, #stop, .between input, .switch").evaluate_all(
        "(all) => all.filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 44)"
        ".map((one) => one.outerHTML)"
    )
    assert small == []


def test_a_drawing_is_refused_on_the_page_in_words(visit, tmp_path):
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    page = visit()
    page.set_input_files("#picture input[type=file]", tmp_path / "drawing.svg")
    page.wait_for_selector("#picture img")
    page.locator("#question textarea").fill("What is it?")
    page.locator("#ask").click()
    problem = page.get_by_role("alert").filter(has_text="no picture that can be read")
    problem.wait_for()
    assert "PNG, JPEG" in problem.inner_text()
    take_example(page, "cups.jpg")  # and goes away again
    assert problem.is_hidden()


def test_without_a_picture_the_page_says_so(visit):
    page = visit()
    page.locator("#ask").click()
    page.get_by_role("alert").filter(has_text="There is no picture yet").wait_for()


def test_stop_stops(visit, pipe, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", 4000)
    page = visit()
    page.get_by_role("button", name=EXAMPLES["cups.jpg"]).click()
    page.wait_for_function("document.querySelector('.progress').textContent.startsWith('Answering')")
    page.locator("#stop").click()
    page.wait_for_function("document.querySelector('.progress').textContent === 'Stopped'")


def test_an_example_takes_the_place_of_one_that_is_under_way(visit, pipe, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", 4000)
    page = visit()
    page.get_by_role("button", name=EXAMPLES["cups.jpg"]).click()
    page.wait_for_function("document.querySelector('.progress').textContent.startsWith('Answering')")
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", 24)
    take_example(page, "house.jpg")
    page.wait_for_timeout(300)  # in which the first could come back
    width, height = page.locator(".photo").evaluate("(one) => [one.naturalWidth, one.naturalHeight]")
    assert width == height and page.locator(".progress").inner_text().startswith("Done")


def test_a_hundred_megabytes_are_refused(address):
    file = io.BytesIO(bytes(100 * 2**20))
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("large.png", file)}, timeout=60)
    assert answer.status_code == 413 and "Traceback" not in answer.text


@pytest.mark.parametrize("path", ["/etc/hostname", "setup.cfg", "http://127.0.0.1:1/a.png"])
def test_no_file_of_the_server_can_be_asked_for(address, path):
    asked = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "What is it?", "none"]}
    event = httpx.post(f"{address}gradio_api/call/see", json=asked).json()["event_id"]
    told = httpx.get(f"{address}gradio_api/call/see/{event}", timeout=30).text
    assert "event: error" in told and '"stage"' not in told and "Traceback" not in told


def test_ten_users_at_once_get_each_their_own(address, pipe, tmp_path):
    modes = ("seg+depth", "seg", "depth", "none")
    asked = []
    for user in range(10):
        Image.new("RGB", (60 + user, 40), (25 * user, 255 - 25 * user, 90)).save(tmp_path / f"{user}.png")
        asked.append((tmp_path / f"{user}.png", f"What does user {user} see?", modes[user % 4]))

    def ask(question: tuple) -> dict:
        path, text, mode = question
        return client.Client(address, verbose=False).predict(client.handle_file(path), text, mode, api_name="/see")

    with ThreadPoolExecutor(10) as users:
        answers = list(users.map(ask, asked))
    for (path, text, mode), answer in zip(asked, answers, strict=True):
        alone = pipe(image=load_picture(path), text=text, perception=mode)
        photo = Image.open(io.BytesIO(base64.b64decode(answer["photo"].partition(",")[2])))
        assert answer["stage"] == "done" and answer["question"] == text
        assert (answer["answer"], answer["codes"]) == (alone["generated_text"], alone["depth_codes"] or [])
        assert photo.size == load_picture(path).size
        assert ("depth" in answer, bool(answer["notes"])) == ("depth" in mode, "seg" in mode)


def test_a_port_that_is_taken(tiny_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--model", str(tiny_folder()), "--device", "cpu", "--port", str(port)]) == 2
    assert f"--port {port} cannot be had" in capsys.readouterr().err.splitlines()[-1]
