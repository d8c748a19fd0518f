"""Widgets: a slider over the steps of an image, and a place to try prompts.

Each also carries a still image, for pages where no widget runs (a notebook read on the web, or one
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
from PIL import Image as Images

from ..pipeline import PromptWarning, SamplingStep, StableDiffusion
from ..samplers import SAMPLERS
from .figures import GAP, Drawing, show_images, some_of

SHOWN = 320             # pixels of the screen: about the side of a large image
SMALL = 104             # the side of a small one
KEPT = 8                # small images that stay to compare with
STILLS = 20             # steps in the still image of a slider, in two rows
REFUSED = (ValueError, FloatingPointError, MemoryError)     # what the pipeline says no with, in one sentence


class WithStill(VBox):
    """A widget with an image beside it in the output, for where widgets do not run."""

    def still(self) -> Drawing:
        """What the image shows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: run this cell in Jupyter to use it>"

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        widget = super()._repr_mimebundle_(**kwargs)
        image, sizes = self.still()._repr_mimebundle_()
        return {**widget, **image, "text/plain": repr(self)}, sizes


class StepSlider(WithStill):
    """A slider over the steps of an image, with a button that plays them.

    At the left the latent after the step, noise and all; at the right the clean image that the
    network saw in it. All of it is decoded here, beforehand, and the slider works in the browser: it
    answers at once, even while Python is busy. Of a batch, the first image is shown.

    steps: what `model.iter_steps` yields, as a list. Raises ValueError when it is empty.
    """

    def __init__(self, steps: Sequence[SamplingStep], *, title: str = "Step by step"):
        if not steps:
            raise ValueError("there are no steps to show: give the list of what `model.iter_steps` yields")
        self.steps, self.title = list(steps), title
        self.frames = Stack([_image(_pair(step)) for step in steps], selected_index=0)
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
    """A prompt, a seed, guidance, steps and a sampler to turn, a button that draws, and the last images.

    The image of the first settings is drawn at once. Words that the model was never taught, and
    settings that no image can be made with, are told beneath the button; nothing is raised.
    """

    def __init__(self, model: StableDiffusion, prompt: str):
        default = model.validate()
        name = {"style": {"description_width": "70px"}, "layout": Layout(width="360px")}
        self.model = model
        self.prompt = Text(prompt, description="prompt", **name)
        self.seed = BoundedIntText(default.seed, min=0, max=2**31 - 1, description="seed", **name)
        self.guidance_scale = FloatSlider(default.guidance_scale, min=0, max=15, step=0.5, description="guidance",
                                          **name)
        self.num_inference_steps = IntSlider(default.num_inference_steps, min=1, max=50, description="steps", **name)
        self.sampler = Dropdown(options=list(SAMPLERS), value=default.sampler, description="sampler", **name)
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.progress = IntProgress(0, min=0, max=default.num_inference_steps, layout=Layout(width="200px"))
        self.message = HTML(layout=Layout(width="360px"))
        self.image = Image(format="png")
        self.earlier = HBox(layout=Layout(flex_flow="row wrap"))
        self.button.on_click(lambda _: self.draw())
        controls = VBox([self.prompt, self.seed, self.guidance_scale, self.num_inference_steps, self.sampler,
                         HBox([self.button, self.progress]), self.message])
        super().__init__([HBox([controls, self.image]), self.earlier])
        self.draw()

    def settings(self) -> dict:
        """What is set, as keywords of `model.iter_steps`."""
        return {name: getattr(self, name).value for name in ("seed", "guidance_scale", "num_inference_steps",
                                                             "sampler")}

    def draw(self):
        """Make the image of what is set, and keep it with its settings."""
        self.button.disabled, self.message.value = True, ""
        try:
            self._show(self._draw(self.prompt.value, self.settings()))
        except REFUSED as error:
            self._tell([str(error)])
        finally:
            self.button.disabled = False

    def _draw(self, prompt: str, settings: dict) -> Images.Image:
        self._tell([message for _, message in self.model.prompt_warnings(prompt)])
        self.progress.value, self.progress.max = 0, settings["num_inference_steps"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)          # they have just been told
            steps = self.model.iter_steps(prompt, **settings)
        for step in steps:
            self.progress.value = step.index + 1
        return step.noisy_images()[0]

    def _show(self, image: Images.Image):
        said = ", ".join(f"{name} {value}" for name, value in self.settings().items())
        self.last = image, f"{self.prompt.value}\n{said}"
        self.image.value = _png(_enlarged(image, SHOWN))
        small = VBox([_image(image, SMALL), HTML(f"<small>{said.replace(', ', '<br>')}</small>")])
        self.earlier.children = (small, *self.earlier.children)[:KEPT]

    def _tell(self, sentences: Sequence[str]):
        self.message.value = "<br>".join(map(html.escape, sentences))

    def still(self) -> Drawing:
        image, said = self.last
        return show_images([image], [said], title="Prompt explorer", columns=1)


def _pair(step: SamplingStep) -> Images.Image:
    """Both images of a step side by side, enlarged."""
    left, right = (_enlarged(images[0], SHOWN) for images in (step.noisy_images(), step.images()))
    both = Images.new("RGB", (left.width + GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both


def _enlarged(image: Images.Image, side: int) -> Images.Image:
    """A whole number of times as large, so that its pixels stay sharp, and at least `side` wide if it was smaller."""
    times = max(1, -(-side // image.width))
    return image.resize((image.width * times, image.height * times), Images.Resampling.NEAREST)


def _image(image: Images.Image, width: int | None = None) -> Image:
    return Image(value=_png(image), format="png", layout=Layout(width=f"{width or image.width}px", margin="4px"))


def _png(image: Images.Image) -> bytes:
    buffer = io.BytesIO()
    Images.fromarray(np.asarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()
