"""Reads and writes config.json, the description of a model in a Hugging Face checkpoint. An
unknown key is an error, because the forward pass might depend on it."""

import dataclasses

NO_BIAS = {"attention_bias": False, "mlp_bias": False}
QWEN = {"num_key_value_heads": 32, "use_sliding_window": False}
# model_type -> its class in transformers, the features that the class fixes whatever config.json
# says, and the values that the class gives to absent keys where they differ from those of Llama.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"sliding_window": None}, {}),
    "mistral": ("MistralForCausalLM", NO_BIAS, {"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": ("Qwen2ForCausalLM", NO_BIAS | {"sliding_window": None, "qkv_bias": True}, QWEN),
    "qwen3": ("Qwen3ForCausalLM", {"mlp_bias": False, "sliding_window": None, "qk_norm": True},
              QWEN | {"head_dim": 128}),
}  # fmt: skip
# Keys that do not change the forward pass. (max_window_layers acts only if use_sliding_window.)
INERT_KEYS = {"_name_or_path", "architectures", "auto_map", "dtype", "is_llama_config",
              "max_window_layers", "pad_token_id", "rope_parameters", "torch_dtype",
              "transformers_version", "unk_token_id", "use_cache"}  # fmt: skip
# Features that a config.json may name, each with the only value that model.py implements.
ONLY_VALUE = {"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1,
              "partial_rotary_factor": 1.0}  # fmt: skip
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALINGS = {"default": (), "linear": ("factor",), "llama3": LLAMA3_ROPE}


def read_config(hf: dict, fields: tuple[dataclasses.Field, ...]) -> dict:
    """Converts a config.json of transformers 4 or 5 to arguments of ModelConfig, whose fields are
    `fields`. Raises a ValueError that names the key and its wrong value."""
    kind, names = hf.get("model_type"), {field.name for field in fields}
    _check(kind in [*FAMILIES], f"model_type {kind!r:.60} is not one of {', '.join(FAMILIES)}")
    _, fixed, absent = FAMILIES[kind]
    hf, layers = absent | hf, hf.get("layer_types")
    if layers == ["full_attention"] * (hf.get("num_hidden_layers") or 0):
        hf["layer_types"] = None  # model.py implements only this kind of layer
    if hf.get("use_sliding_window") is False and kind != "mistral":
        hf["sliding_window"] = None  # Qwen writes the size of a window that it does not use
    known = names | INERT_KEYS | ONLY_VALUE.keys()
    # null, and false for a feature that is not known here, mean that the feature is off.
    hf = {k: v for k, v in hf.items() if v is not None and (k in known or v is not False)}
    for key, value in hf.items():
        only, named = (fixed | ONLY_VALUE).get(key, value), f"{key} = {value!r:.60}"
        _check(value == only, f"{named} is not implemented for {kind}, only {only!r}")
        _check(key in known, f"{named} is unknown (remove the key if it does not change the model)")
    for key in ("hidden_size", "num_attention_heads"):
        _check_number(key, hf.get(key), int)
    heads, values = hf["num_attention_heads"], {}
    hf = {"num_key_value_heads": heads, "head_dim": hf["hidden_size"] // heads} | hf | _rope(hf)
    for field in fields:
        default = None if field.default is dataclasses.MISSING else field.default
        values[field.name] = value = (hf | fixed).get(field.name, default)
        if field.type in (int, float):
            _check_number(field.name, value, field.type)
        valid = field.type is not bool or isinstance(value, bool)
        _check(valid, f"{field.name} must be true or false, not {value!r:.60}")
    _check_number("sliding_window", hf.get("sliding_window", 1), int)
    bos, divisible = hf.get("bos_token_id", 0), heads % hf["num_key_value_heads"] == 0
    _check(type(bos) is int and bos >= 0, f"bos_token_id must be a token id, not {bos!r:.60}")
    _check(divisible, "num_attention_heads must be a multiple of num_key_value_heads")
    _check(hf["head_dim"] % 2 == 0, "head_dim must be even for the rotary embedding")
    return values


def write_config(values: dict) -> dict:
    """Converts the fields of a ModelConfig to a config.json for transformers 4 and 5."""
    hf = {key: value for key, value in values.items() if key not in ("qkv_bias", "qk_norm")}
    rope = {"rope_theta": values["rope_theta"], "rope_type": "default"}
    rope |= values["rope_scaling"] or {}
    classes = [FAMILIES[values["model_type"]][0]]
    return hf | ONLY_VALUE | {"architectures": classes, "rope_parameters": rope}


def _rope(hf: dict) -> dict:
    """Reads rope_theta and rope_scaling, which transformers 5 puts into rope_parameters."""
    rope = hf.get("rope_scaling", hf.get("rope_parameters", {}))
    _check(isinstance(rope, dict), f"rope_scaling must be an object, not {rope!r:.60}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    _check_number("rope_theta", hf.get("rope_theta", theta), float)  # must be valid even if unused
    _check(rope.get("partial_rotary_factor", 1) == 1, "partial_rotary_factor must be 1")
    _check(kind in [*ROPE_SCALINGS], f"rope type {kind!r:.60} is not default, linear or llama3")
    for key in rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        _check(key in ROPE_SCALINGS[kind], f"{key!r:.60} is not a key of rope type {kind}")
    scaling = {key: rope.get(key) for key in ROPE_SCALINGS[kind]}
    for key, value in scaling.items():
        _check_number(f"rope_scaling.{key}", value, float)
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    _check(low < high, "high_freq_factor must be above low_freq_factor")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | scaling if scaling else None}


def _check_number(name: str, value: object, kind: type) -> None:
    valid = type(value) in (int, kind) and 0 < value < (2**24 if kind is int else 2**40)
    _check(valid, f"{name} must be a positive {kind.__name__}, not {value!r:.60}")


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(f"config.json: {message}; edit the file or use another model")
