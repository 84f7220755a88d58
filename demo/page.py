"""The page: what is put in on one side, what the model sees on the other."""

from html import escape
from pathlib import Path

import gradio as gr

from ..cli import UNTRAINED
from .look import LONGEST_QUESTION, MOST_BYTES, SEEN, code_colours, look

HERE = Path(__file__).parent
AT_ONCE, MOST_WAITING = 2, 64  # questions that are answered side by side, and that wait for their turn
DAY = 24 * 60 * 60
EXAMPLES = {
    "cups.jpg": "Where is the blue cylinder?",
    "balls.jpg": "Which is closer to the camera, the green ball or the brown ball?",
    "house.jpg": "Find the house.",
    "corridor.jpg": "Please segment the blue mug in this image.",
}
INTRODUCTION = """<header class="top"><h1>Perceptio</h1>
<p>It <em>sees before it speaks</em>: it first marks what the question is about, writes a map of depth in a hundred
tokens, and only then answers.</p>%s</header>"""
CLICK_ASK = "() => { document.querySelector('#ask').click() }"
BARE = {"apply_default_css": False, "js_on_load": None, "elem_classes": "bare"}
STOP = "(state) => state && { ...state, stage: 'stopped', message: 'Stopped' }"


def build_page(pipe) -> gr.Blocks:
    warning = f'<p class="warning" role="note">{escape(UNTRAINED)}</p>'
    untrained = getattr(pipe.model.config, "untrained", False)

    def see(picture, question, perception):
        yield from look(pipe, picture, question, perception)

    with gr.Blocks(title="Perceptio", analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        gr.HTML(INTRODUCTION % (warning if untrained else ""), **BARE)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "webcam", "clipboard"], height=280,
                    buttons=[], elem_id="picture", alt_text="The picture that you ask about",
                )  # fmt: skip
                question = gr.Textbox(
                    label="Question",
                    placeholder="Which cup is closer?",
                    max_length=LONGEST_QUESTION,
                    elem_id="question",
                )
                perception = gr.Radio(
                    [(name, mode) for mode, name in SEEN.items()], value="seg+depth", label="See", elem_id="see"
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80, scale=3)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80, scale=1)
                gr.HTML('<h2 class="label">Examples</h2>', **BARE)
                with gr.Row(elem_id="examples"):
                    examples = {
                        name: gr.Button(text, icon=HERE / "examples" / name, min_width=120)
                        for name, text in EXAMPLES.items()
                    }
            with gr.Column(scale=3, min_width=300):
                viewer = gr.HTML(
                    None, html_template=_part("html"), css_template=_part("css"), js_on_load=_part("js"),
                    apply_default_css=False, elem_id="viewer", elem_classes="bare", colours=code_colours(pipe.model),
                )  # fmt: skip
        # Without preprocessing, which would open whatever came; gradio still checks that the file was uploaded here.
        asked = gr.on(
            [ask.click, question.submit], see, [picture, question, perception], viewer, preprocess=False,
            concurrency_limit=AT_ONCE, show_progress="minimal", api_name="see", trigger_mode="multiple",
        )  # fmt: skip
        stop.click(None, viewer, viewer, js=STOP, cancels=[asked], api_visibility="private")
        for name, button in examples.items():
            filled = button.click(
                lambda name=name: (HERE / "examples" / name, EXAMPLES[name], "seg+depth"), None,
                [picture, question, perception], cancels=[asked], queue=False, api_visibility="private",
            )  # fmt: skip
            filled.then(None, js=CLICK_ASK, api_visibility="private")
    return page.queue(max_size=MOST_WAITING)


def _part(ending: str, name: str = "viewer") -> str:
    return (HERE / f"{name}.{ending}").read_text(encoding="utf-8")


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Launch, and say where.  `wait`: until it is stopped."""
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=not wait, max_file_size=MOST_BYTES, share=False,
            theme=theme(), head=f"<style>{_part('css', 'page')}</style>", ssr_mode=False,
            footer_links=["api", "gradio", "settings"],
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"--port {port} cannot be had ({error}): pass another one") from error
    return address


def theme() -> gr.themes.Base:
    """Our colours, and the fonts of the machine: none is fetched."""
    colours = {
        "body_background_fill": ("#fafaf8", "#17181b"), "body_text_color": ("#1c1e22", "#ececea"),
        "body_text_color_subdued": ("#5a5e66", "#a8acb4"), "block_background_fill": ("#ffffff", "#202226"),
        "block_label_text_color": ("#40444c", "#c8ccd2"), "block_title_text_color": ("#40444c", "#c8ccd2"),
        "block_label_background_fill": ("#ffffff", "#202226"), "border_color_primary": ("#d8d8d2", "#3a3c42"),
        "input_border_color": ("#85897f", "#767a84"), "input_background_fill": ("#ffffff", "#17181b"),
        "input_placeholder_color": ("#5f636b", "#a0a4ac"),
        "button_primary_background_fill": ("#07375b", "#ffea69"), "button_primary_text_color": ("#ffffff", "#1c1e22"),
        "button_primary_background_fill_hover": ("#0b4d7d", "#fff3a8"),
        "button_secondary_background_fill": ("#f2f2ee", "#2a2c31"),
        "button_secondary_text_color": ("#1c1e22", "#ececea"),
        "checkbox_label_background_fill": ("#f2f2ee", "#2a2c31"),
        "checkbox_label_background_fill_selected": ("#dce8ef", "#3c3a24"),
        "checkbox_label_text_color_selected": ("#1c1e22", "#ececea"),
        "checkbox_background_color_selected": ("#07557f", "#b8a52c"),
    }  # fmt: skip
    values = {name: light for name, (light, _) in colours.items()}
    values["input_border_width"] = "1px"
    values["color_accent"] = "#2f7fb0"  # of focus: at least 3 to 1 on the light and on the dark paper
    values |= {f"{name}_dark": dark for name, (_, dark) in colours.items()}
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Base(radius_size="md", **fonts).set(**values)
