"""sdlearn: Stable Diffusion, built from its parts to be read.

    from sdlearn import StableDiffusion
    model = StableDiffusion.load()
    model.text2img("a red apple to the left of a cat on a yellow background", seed=0)[0]
"""

__version__ = "0.1.0"
__all__ = ["StableDiffusion"]


def __getattr__(name: str):
    # Imported when it is asked for, so that `python -m sdlearn --help` need not wait for PyTorch.
    if name == "StableDiffusion":
        from .pipeline import StableDiffusion

        return StableDiffusion
    raise AttributeError(f"module 'sdlearn' has no attribute '{name}'")
