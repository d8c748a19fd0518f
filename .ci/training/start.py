"""Fill a run's folder with the autoencoder beside this file, and with the shipped tokenizer and CLIP.

    python .ci/training/start.py runs/next
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from sdlearn.checkpoint.shipped import SHIPPED
from sdlearn.config import PRESETS
from sdlearn.training import stages
from sdlearn.training.loop import save_state
from sdlearn.training.vae import measure_scaling_factor
from sdlearn.vae import VAE

FILE = Path(__file__).parent / "vae.safetensors"


def main(run: Path):
    mini = PRESETS["mini"]
    config = replace(mini, vae=replace(mini.vae, layers_per_block=2))
    vae = VAE(config.vae).eval()
    with safe_open(FILE, "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
        progress = json.loads(file.metadata()["progress"])
    vae.load_state_dict(weights)
    save_state(run / "vae-state.pt", {"model": weights, "average": weights, "progress": progress})
    (run / "scaling_factor.txt").write_text(f"{measure_scaling_factor(vae):.5f}")
    small = replace(config, unet=PRESETS["tiny"].unet)      # another U-Net: only the other parts are taken
    print(f"{run} holds vae, {', '.join(stages.start_from(SHIPPED / 'mini', run, small))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
