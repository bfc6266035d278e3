"""Names of the metrics that an objective measures next to the loss."""

from mooshak.config.sections import Config
from mooshak.numerics import grpo, preference


def objective_metrics(config: Config) -> tuple[str, ...]:
    """Return the names of the means that a step logs, in their order."""
    if config.data.format == "preferences":
        return preference.metric_names(config.dpo)
    return grpo.metric_names(config.grpo) if config.data.format == "prompts" else ()
