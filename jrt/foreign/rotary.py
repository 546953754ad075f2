"""Models whose rotary positions depend on the longest row of a batch."""

from collections.abc import Mapping

from transformers import PreTrainedModel


def switching_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a model with LongRoPE (Ding et al. 2024, arXiv 2402.13753) reads with its short factors.

    As soon as one row of a batch is longer, transformers uses the long factors for all rows. None: the model has no
    such switch."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return None
    found = [one for one in (parameters, *parameters.values()) if isinstance(one, Mapping)]  # by kind of layer, or one
    lengths = [one.get("original_max_position_embeddings") for one in found if one.get("rope_type") == "longrope"]
    return min((length for length in lengths if isinstance(length, int)), default=None)
