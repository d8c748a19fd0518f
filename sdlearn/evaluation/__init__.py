"""The judge and the measures: how well images show what was asked for."""

from .detector import Detector, DetectorConfig, visible_colour
from .judge import Detection, Detections, Judge, load_judge, save_judge
from .sampling import JudgedImage, compose_prompt_scene, evaluate, evaluate_scenes, generate_images, score_images
from .scoring import Scores, Verdict, compute_scores, duplicate_rate, judge_image, judge_images
from .tasks import GENEVAL, HELD_OUT, TASKS, ObjectSpec, Prompt, SceneSpec, make_prompts

__all__ = ["GENEVAL", "HELD_OUT", "TASKS", "Detection", "Detections", "Detector", "DetectorConfig", "Judge",
           "JudgedImage", "ObjectSpec", "Prompt", "SceneSpec", "Scores", "Verdict", "compose_prompt_scene",
           "compute_scores", "duplicate_rate", "evaluate", "evaluate_scenes", "generate_images", "judge_image",
           "judge_images", "load_judge", "make_prompts", "save_judge", "score_images", "visible_colour"]
