"""config.json: reads as in transformers, survives writing, and is refused if a key is unknown."""

import pytest
import torch
from conftest import LLAMA3_ROPE, tiny_config

from model import Llama, ModelConfig

ALWAYS = {  # the features that the class of a family has, whatever a config.json says
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


def without(hf: dict, *keys: str) -> dict:
    return {key: value for key, value in hf.items() if key not in keys}


@pytest.mark.parametrize("model_type", ALWAYS)
def test_a_config_comes_back_as_it_was(model_type):
    implied = {"model_type": model_type, **ALWAYS[model_type]}
    changes = [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "head_dim": 24},
        {"bos_token_id": 0, "eos_token_id": 0},  # ids, not features that are switched off
        {"bos_token_id": None, "eos_token_id": [3, 4], "rms_norm_eps": 1e-5},
    ]
    changes += [{"sliding_window": 7}] * (model_type == "mistral")
    changes += [{"attention_bias": True, "mlp_bias": True}] * (model_type == "llama")
    changes += [{"attention_bias": True}] * (model_type == "qwen3")
    for change in changes:
        config = tiny_config(**implied | change)
        assert ModelConfig.from_hf(config.to_hf()) == config
        assert config.to_hf()["hidden_act"] == "silu"


def test_rope_is_read_in_the_form_of_every_version_of_transformers():
    hf = without(tiny_config().to_hf(), "rope_parameters", "rope_scaling", "rope_theta")
    new = hf | {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}}
    old = hf | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    oldest = old | {"rope_scaling": {"type": "llama3", **without(LLAMA3_ROPE, "rope_type")}}
    for form in (new, old, oldest):
        config = ModelConfig.from_hf(form)
        assert config == tiny_config(rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    assert ModelConfig.from_hf(hf) == tiny_config()


def test_rope_keys_take_the_precedence_that_they_have_in_transformers():
    transformers = pytest.importorskip("transformers")
    hf = without(tiny_config().to_hf(), "rope_parameters", "rope_scaling", "rope_theta")
    old, new = ({"rope_type": "linear", "factor": factor} for factor in (2.0, 3.0))
    for keys in (
        {"rope_scaling": old, "rope_parameters": {**new, "rope_theta": 5e4}, "rope_theta": 7e4},
        {"rope_scaling": old, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_scaling": None, "rope_parameters": {**new, "rope_theta": 5e4}, "rope_theta": 7e4},
        {"rope_parameters": new, "rope_theta": 7e4},
    ):
        theirs = transformers.AutoConfig.for_model(**hf | keys).rope_parameters
        ours = ModelConfig.from_hf(hf | keys)
        found = ours.rope_scaling | {"rope_theta": ours.rope_theta}
        assert found == without(theirs, "partial_rotary_factor")


@pytest.mark.parametrize("model_type", ALWAYS)
def test_absent_and_null_keys_mean_what_they_mean_to_transformers(model_type):
    """MistralConfig, for example, gives an absent sliding_window 4096, and null means no window."""
    transformers = pytest.importorskip("transformers")
    names = ["sliding_window", "num_key_value_heads", "head_dim", "rms_norm_eps"]
    names += ["tie_word_embeddings", "attention_bias", "mlp_bias"]
    hf = without(tiny_config(num_attention_heads=32, num_key_value_heads=4).to_hf(), *names)
    hf |= {"model_type": model_type, "hidden_size": 64 if model_type != "qwen3" else 4096}
    cases = [{}, {"sliding_window": None}, {"head_dim": 6}, {"layer_types": ["full_attention"] * 2}]
    if model_type == "mistral":
        cases += [{"sliding_window": 9}, {"sliding_window": 9, "use_sliding_window": False}]
    else:
        cases += [{"num_key_value_heads": None}]  # transformers refuses null for Mistral
    if model_type in ("qwen2", "qwen3"):  # without use_sliding_window the size has no effect
        cases += [{"sliding_window": 9}, {"sliding_window": 9, "use_sliding_window": False}]
    for case in cases:
        ours = ModelConfig.from_hf(hf | case)
        theirs = transformers.AutoConfig.for_model(**hf | case)
        for name in names:
            expected = getattr(theirs, name, None)  # Qwen2, for example, has no head_dim
            if name == "head_dim" and expected is None:
                expected = theirs.hidden_size // theirs.num_attention_heads
            if name.endswith("bias") and expected is None:
                expected = False
            assert getattr(ours, name) == expected, (name, case)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_mistral_config_without_a_window_has_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 2}
    small |= {"num_key_value_heads": 8, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    hf = tiny_config(**small, model_type="mistral", sliding_window=4096).to_hf()
    torch.manual_seed(0)
    ours = Llama(ModelConfig.from_hf(without(hf, "sliding_window")))
    config = transformers.AutoConfig.for_model(**without(hf, "sliding_window"))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 16, (1, 4200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.model(tokens).last_hidden_state
        assert (ours(tokens) - expected).abs().max() < 1e-4
        hf["sliding_window"] = None
        full = Llama(ModelConfig.from_hf(hf))
        full.load_state_dict(ours.state_dict())
        difference = (full(tokens) - expected).abs().amax(dim=(0, 2))  # (4200,)
    assert difference[:4096].max() < 1e-4 < difference[4096:].max()


WRONG = [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "model_type None"),
    ({"model_type": []}, "model_type"),
    ({"layer_types": 3}, "layer_types = 3 is unknown (remove the key if"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"sliding_window": 5}, "sliding_window = 5 is not implemented for llama, only None"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    ({"model_type": "mistral", "sliding_window": -5}, "sliding_window must be a positive int"),
    ({"model_type": "mistral", "sliding_window": 7.5}, "sliding_window must be a positive int"),
    ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias"),
    ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
    ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented for llama, only 'silu'"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": []}}, "rope type"),
    ({"rope_theta": "x"}, "rope_theta must be a positive float"),
    ({"rope_parameters": {"rope_thetaa": 5e5}}, "'rope_thetaa' is not a key of rope type default"),
    ({"rope_parameters": {**LLAMA3_ROPE, "rope_type": "default"}}, "is not a key of rope type"),
    ({"rope_parameters": {**LLAMA3_ROPE, "rope_type": "linear"}}, "is not a key of rope type"),
    ({"rope_parameters": []}, "rope_scaling must be an object"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"rms_norm_eps": False}, "rms_norm_eps must be a positive float, not False"),
    ({"hidden_act": False}, "hidden_act = False is not implemented"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling.factor must be a positive float"),
    ({"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor must be"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive float, not 0"),
    ({"rope_parameters": [1]}, "rope_scaling must be an object"),
    ({"hidden_size": -1}, "hidden_size must be a positive int, not -1; edit the file or use"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": 2**39}, "hidden_size"),
    ({"vocab_size": None}, "vocab_size must be a positive int, not None"),
    ({"intermediate_size": 4.0}, "intermediate_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive int"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"bos_token_id": "x"}, "bos_token_id must be a token id, not 'x'"),
    ({"bos_token_id": -1}, "bos_token_id"),
]


def test_configurations_that_would_be_computed_wrongly_are_refused():
    for change, match in WRONG:
        with pytest.raises(ValueError) as error:
            ModelConfig.from_hf(tiny_config().to_hf() | change)
        assert str(error.value).startswith("config.json: ") and match in str(error.value), change
