"""A program for the interpreter that has transformers 4: what it reads in config files."""

import json
import sys


def main() -> None:
    """Read {name: folder}, write {name: what the config says} or {name: {"absent": type}}."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    with open(sys.argv[1]) as file:
        folders = json.load(file)
    found = {}
    for name, folder in folders.items():
        with open(f"{folder}/config.json") as file:
            model_type = json.load(file)["model_type"]
        if model_type not in CONFIG_MAPPING_NAMES:
            found[name] = {"absent": model_type}
            continue
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        found[name] = {
            "class": type(config).__name__,
            "rope_theta": config.rope_theta,
            "local_rope_theta": getattr(config, "rope_local_base_freq", None),
            "rope_scaling": config.rope_scaling,
            "long_after": getattr(config, "original_max_position_embeddings", None),
            "partial_rotary_factor": getattr(config, "partial_rotary_factor", None),
            "head_dim": config.head_dim,
            "num_key_value_heads": config.num_key_value_heads,
            "hidden_size": config.hidden_size,
            "layer_types": getattr(config, "layer_types", None),
            "tie_word_embeddings": config.tie_word_embeddings,
            # As a dtype, where torch is there to have one.
            "dtype": str(config.dtype).removeprefix("torch."),
        }
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
