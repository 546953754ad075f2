"""Makes tiny random models of transformers' recurrent and hybrid classes, and of a few other classes as controls.

A model has two to six layers, at least one of each kind that its class has. Classes that the installed transformers
lacks are left out.
"""

from __future__ import annotations

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 256
STD = 0.4  # standard deviation of the weights, large enough that a layer's error shows in the logits

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}

# Model type: configuration class and its fields.
CONTROLS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _SIZES),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "gemma": ("GemmaConfig", _SIZES | _HEADS),
    "mistral": ("MistralConfig", _SIZES | {"sliding_window": 16}),
}
RECURRENT: dict[str, tuple[str, dict]] = {
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 512}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        _SIZES | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "falcon_mamba": ("FalconMambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "falcon_h1": ("FalconH1Config", _SIZES | _MAMBA2 | {"mamba_d_ssm": 64}),
    "bamba": ("BambaConfig", _SIZES | _MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "jamba": (
        "JambaConfig",
        _SIZES
        | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "zamba": (
        "ZambaConfig",
        _SIZES
        | {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2}
        | {"mamba_d_state": 8, "n_mamba_heads": 2},
    ),
    "zamba2": (
        "Zamba2Config",
        _SIZES
        | {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
        | {"mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        _SIZES
        | _MAMBA2
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        _SIZES
        | _HEADS
        | {"num_hidden_layers": 4, "hybrid_override_pattern": "M*M-", "mamba_num_heads": 4, "mamba_head_dim": 16}
        | {"n_groups": 1, "ssm_state_size": 8, "chunk_size": 8},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _SIZES | _HEADS | _TWO_KINDS | _DELTA_NET | _EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", _SIZES | _HEADS | _TWO_KINDS | _DELTA_NET),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        _SIZES | _HEADS | _TWO_KINDS | _DELTA_NET | _EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "lfm2": ("Lfm2Config", _SIZES | {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        _SIZES | _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "lfm3": (
        "Lfm3Config",
        _SIZES
        | _HEADS
        | {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]}
        | {"sliding_window": 16},
    ),
    "minimax": (
        "MiniMaxConfig",
        _SIZES | _HEADS | _TWO_KINDS | {"block_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", _SIZES | _TWO_KINDS | _DELTA_NET),
    "kimi_linear": (
        "KimiLinearConfig",
        _SIZES
        | _TWO_KINDS
        | _LATENT
        | {"linear_head_dim": 16, "linear_num_heads": 2, "moe_intermediate_size": 32}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        _SIZES
        | _HEADS
        | _TWO_KINDS
        | _LATENT
        | {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        | {"topk_group": 1, "first_k_dense_replace": 1},
    ),
    "zaya": (
        "ZayaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        | _HEADS
        | {"moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 32},
    ),
    "lara_mini": (
        "LaraMiniConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        | _HEADS
        | _TWO_KINDS
        | _DELTA_NET
        | _EXPERTS
        | {"shared_expert_intermediate_size": 32},
    ),
    "xlstm": ("xLSTMConfig", {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2}),
}
KINDS = CONTROLS | RECURRENT


def available() -> list[str]:
    """Returns the model types that the installed transformers has."""
    return [kind for kind, (name, _) in KINDS.items() if hasattr(transformers, name)]


def configuration(kind: str) -> PretrainedConfig:
    """Returns a tiny configuration. The begin token is 1, the end token 2, the padding token 0."""
    name, fields = KINDS[kind]
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, name)(**tokens, **fields)


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Returns a model with random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configuration(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=STD)
    return model.eval()
