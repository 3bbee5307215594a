"""What the files of a run folder are called, for those who write them and those who read them."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RECIPE, METRICS, CHECKPOINTS = "recipe.json", "metrics.jsonl", "checkpoints"
RECONSTRUCTIONS, EVENTS, REPORT, RESULTS = "reconstructions", "tensorboard", "report.html", "results.json"


def picture_name(step: int) -> str:
    """Of the reconstructions of a step, within their folder."""
    return f"step-{step:06}.png"


def predictions_name(command: str) -> str:
    """Of the table of test pictures and what a command took them for."""
    return f"predictions-{command}.csv"


def mistakes_name(command: str) -> str:
    """Of the picture of those that it was most wrong about."""
    return f"mistakes-{command}.png"
