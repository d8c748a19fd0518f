"""The judge and the measures: how well images show what was asked for."""

from .detector import Detector, DetectorConfig, look
from .judge import Detection, Judge, Seen, load_judge, save_judge
from .sampling import Judged, evaluate, evaluate_scenes, sample, scene_for, scores_of
from .scoring import Scores, Verdict, duplicate_rate, judge_images, scores, verdict
from .tasks import GENEVAL, HELD_OUT, TASKS, Prompt, Thing, Wanted, prompts_for

__all__ = ["GENEVAL", "HELD_OUT", "TASKS", "Detection", "Detector", "DetectorConfig", "Judge", "Judged", "Prompt",
           "Scores", "Seen", "Thing", "Verdict", "Wanted", "duplicate_rate", "evaluate", "evaluate_scenes",
           "judge_images", "load_judge", "look", "sample", "save_judge", "scene_for", "scores", "scores_of",
           "prompts_for", "verdict"]
