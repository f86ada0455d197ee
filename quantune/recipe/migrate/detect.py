"""Which tool a YAML was written for, told by its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantune.recipe.migrate.report import Kind

LLAMAFACTORY = frozenset(
    "model_name_or_path finetuning_type quantization_bit template stage dataset_dir cutoff_len do_train "
    "per_device_train_batch_size lora_rank lora_target preprocessing_num_workers overwrite_output_dir "
    "num_train_epochs lr_scheduler_type overwrite_cache plot_loss".split()
)
"""Keys of LlamaFactory that axolotl does not have."""
ENOUGH = 3
"""That many of them say it is LlamaFactory's, when none of the telling ones is there."""
TELLING = frozenset({"model_name_or_path", "finetuning_type", "quantization_bit"})

NOT_YET = {
    "llamafactory": "this is a YAML of LlamaFactory; only axolotl's are translated as yet",
    "torchtune": "this is a config of torchtune; only axolotl's YAMLs are translated as yet",
}


def kind_of(document: dict[Any, Any]) -> Kind:
    """The tool a document was written for; one without a telling key is taken for axolotl's."""
    if "base_model" in document:
        return "axolotl"
    if any(key == "_component_" for key in _keys(document)):
        return "torchtune"
    names = {key for key in document if isinstance(key, str)}
    if names & TELLING or len(names & LLAMAFACTORY) >= ENOUGH:
        return "llamafactory"
    return "axolotl"


def _keys(value: Any) -> Iterator[Any]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield key
        yield from _keys(member)
