"""Widgets: a slider over the steps of a picture, and a place to try prompts.

Each also carries a still picture, for pages where no widget runs (a notebook read on the web, or one
that was opened and not run yet): its output holds both, and the front end shows what it can.
"""

import html
import io
import warnings
from collections.abc import Sequence

import numpy as np
from ipywidgets import (
    HTML,
    BoundedIntText,
    Button,
    Dropdown,
    FloatSlider,
    HBox,
    Image,
    IntProgress,
    IntSlider,
    Layout,
    Play,
    SelectionSlider,
    Stack,
    Text,
    VBox,
    jslink,
)
from PIL import Image as Pictures

from ..pipeline import PromptWarning, SamplingStep, StableDiffusion
from ..samplers import SAMPLERS
from .figures import GAP, Drawing, show_images, some_of

SHOWN = 320             # pixels of the screen: about the side of a large picture
SMALL = 104             # the side of a small one
KEPT = 8                # small pictures that stay to compare with
STILLS = 20             # steps in the still picture of a slider, in two rows
REFUSED = (ValueError, FloatingPointError, MemoryError)     # what the pipeline says no with, in one sentence


class WithStill(VBox):
    """A widget with a picture beside it in the output, for where widgets do not run."""

    def still(self) -> Drawing:
        """What the picture shows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: run this cell in Jupyter to use it>"

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        widget = super()._repr_mimebundle_(**kwargs)
        picture, sizes = self.still()._repr_mimebundle_()
        return {**widget, **picture, "text/plain": repr(self)}, sizes


class StepSlider(WithStill):
    """A slider over the steps of a picture, with a button that plays them.

    At the left the latent after the step, noise and all; at the right the clean picture that the
    network saw in it. All of it is decoded here, beforehand, and the slider works in the browser: it
    answers at once, even while Python is busy. Of a batch, the first picture is shown.

    steps: what `model.steps` yields, as a list. Raises ValueError when it is empty.
    """

    def __init__(self, steps: Sequence[SamplingStep], *, title: str = "Step by step"):
        if not steps:
            raise ValueError("there are no steps to show: give the list of what `model.steps` yields")
        self.steps, self.title = list(steps), title
        self.frames = Stack([_picture(_pair(step)) for step in steps], selected_index=0)
        names = [f"{step.index + 1} of {step.of}, from t = {step.t:.0f}" for step in steps]
        self.slider = SelectionSlider(options=[(name, i) for i, name in enumerate(names)], description="step",
                                      layout=Layout(width="480px"))
        self.play = Play(min=0, max=len(steps) - 1, interval=250, show_repeat=False)
        self.links = (jslink((self.play, "value"), (self.slider, "index")),
                      jslink((self.slider, "index"), (self.frames, "selected_index")))
        heads = HTML("<b>left:</b> the latent after the step &ensp; <b>right:</b> what the network saw in it")
        super().__init__([HBox([self.play, self.slider]), heads, self.frames])

    def still(self) -> Drawing:
        shown = some_of(self.steps, STILLS)
        return show_images([step.images()[0] for step in shown], [f"step {step.index + 1}" for step in shown],
                           title=self.title, columns=STILLS // 2)


class PromptExplorer(WithStill):
    """A prompt, a seed, guidance, steps and a sampler to turn, a button that draws, and the last pictures.

    The picture of the first settings is drawn at once. Words that the model was never taught, and
    settings that no picture can be made with, are told beneath the button; nothing is raised.
    """

    def __init__(self, model: StableDiffusion, prompt: str):
        default = model.checked({})
        name = {"style": {"description_width": "70px"}, "layout": Layout(width="360px")}
        self.model = model
        self.prompt = Text(prompt, description="prompt", **name)
        self.seed = BoundedIntText(default.seed, min=0, max=2**31 - 1, description="seed", **name)
        self.guidance = FloatSlider(default.guidance, min=0, max=15, step=0.5, description="guidance", **name)
        self.steps = IntSlider(default.steps, min=1, max=50, description="steps", **name)
        self.sampler = Dropdown(options=list(SAMPLERS), value=default.sampler, description="sampler", **name)
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.progress = IntProgress(0, min=0, max=default.steps, layout=Layout(width="200px"))
        self.message = HTML(layout=Layout(width="360px"))
        self.picture = Image(format="png")
        self.earlier = HBox(layout=Layout(flex_flow="row wrap"))
        self.button.on_click(lambda _: self.draw())
        controls = VBox([self.prompt, self.seed, self.guidance, self.steps, self.sampler,
                         HBox([self.button, self.progress]), self.message])
        super().__init__([HBox([controls, self.picture]), self.earlier])
        self.draw()

    def settings(self) -> dict:
        """What is set, as keywords of `model.steps`."""
        return {name: getattr(self, name).value for name in ("seed", "guidance", "steps", "sampler")}

    def draw(self):
        """Make the picture of what is set, and keep it with its settings."""
        self.button.disabled, self.message.value = True, ""
        try:
            self._show(self._draw(self.prompt.value, self.settings()))
        except REFUSED as error:
            self._tell([str(error)])
        finally:
            self.button.disabled = False

    def _draw(self, prompt: str, settings: dict) -> Pictures.Image:
        self._tell([message for _, message in self.model.doubts(prompt)])
        self.progress.value, self.progress.max = 0, settings["steps"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)          # they have just been told
            steps = self.model.steps(prompt, **settings)
        for step in steps:
            self.progress.value = step.index + 1
        return step.noisy_images()[0]

    def _show(self, picture: Pictures.Image):
        said = ", ".join(f"{name} {value}" for name, value in self.settings().items())
        self.last = picture, f"{self.prompt.value}\n{said}"
        self.picture.value = _png(_enlarged(picture, SHOWN))
        small = VBox([_picture(picture, SMALL), HTML(f"<small>{said.replace(', ', '<br>')}</small>")])
        self.earlier.children = (small, *self.earlier.children)[:KEPT]

    def _tell(self, sentences: Sequence[str]):
        self.message.value = "<br>".join(map(html.escape, sentences))

    def still(self) -> Drawing:
        picture, said = self.last
        return show_images([picture], [said], title="Prompt explorer", columns=1)


def _pair(step: SamplingStep) -> Pictures.Image:
    """Both pictures of a step side by side, enlarged."""
    left, right = (_enlarged(images[0], SHOWN) for images in (step.noisy_images(), step.images()))
    both = Pictures.new("RGB", (left.width + GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both


def _enlarged(picture: Pictures.Image, side: int) -> Pictures.Image:
    """A whole number of times as large, so that its pixels stay sharp, and at least `side` wide if it was smaller."""
    times = max(1, -(-side // picture.width))
    return picture.resize((picture.width * times, picture.height * times), Pictures.Resampling.NEAREST)


def _picture(picture: Pictures.Image, width: int | None = None) -> Image:
    return Image(value=_png(picture), format="png", layout=Layout(width=f"{width or picture.width}px", margin="4px"))


def _png(picture: Pictures.Image) -> bytes:
    buffer = io.BytesIO()
    Pictures.fromarray(np.asarray(picture)).save(buffer, format="PNG")
    return buffer.getvalue()
