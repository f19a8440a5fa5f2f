"""Tiny random models of the families that people load, two layers each, with weights that make attention choose."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, LENGTH, PADDED = 64, 24, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FULL = {"layer_types": ["full_attention"] * 2}
ALL_ALIKE = {"num_key_value_heads": 4}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_local_experts": 4, **EXPERTS,
}  # fmt: skip
ONE_GROUP = {"n_group": 1, "topk_group": 1}

# family: model_type and what its configuration says beside SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                             "rope_theta": 10000.0}},
    ),
    "llama3": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64, "rope_theta": 10000.0}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma2_full": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, **FULL}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, **ALL_ALIKE}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt2_scaled": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                             "scale_attn_by_inverse_layer_idx": True}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, **ALL_ALIKE}),
    "cohere": ("cohere", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", FULL),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {}),
    "granite": ("granite", {"attention_multiplier": 0.2}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "gpt_oss_full": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **FULL}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, **ONE_GROUP, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **ONE_GROUP}),
    "deepseek_v3_halves": ("deepseek_v3", {**LATENT, **ONE_GROUP, "q_lora_rank": None, "rope_interleave": False}),
    "minicpm3": ("minicpm3", LATENT),
    "mimo_v2_flash": ("mimo_v2_flash", {"head_dim": 16, "v_head_dim": 8}),
    "llama4": ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48,
                               "no_rope_layers": [1, 0], "attention_chunk_size": 128, "use_qk_norm": False}),
    "minimax": ("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8,
                            "layer_types": ["linear_attention", "full_attention"]}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
}  # fmt: skip
FAMILIES = {name: family for name, family in FAMILIES.items() if family[0] in CONFIG_MAPPING}  # older ones lack some
# Rotary positions and full attention in every layer: two segments are one pass, if nothing is left out.
ORACLE = (
    *("llama", "llama_yarn", "llama3", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_neox", "phi", "cohere", "olmo2"),
    *("olmo3", "smollm3", "starcoder2", "granite", "gemma2_full", "gpt_oss_full"),
    *("llama4", "deepseek_v2", "deepseek_v3", "deepseek_v3_halves", "minicpm3"),
)
ORACLE = tuple(name for name in ORACLE if name in FAMILIES)
REFUSED = {
    "falcon": ("falcon", {"alibi": False}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "stablelm": ("stablelm", {}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
}


def made(family: str, dtype: torch.dtype = torch.float32, **changed: Any) -> PreTrainedModel:
    """A new model of a family, the same each time."""
    kind, given = {**FAMILIES, **REFUSED}[family]
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **given, **changed}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


@cache
def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """(B, N) ids that are no padding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator, device="cpu")


def left_padded() -> Tensor:
    """(2, N): the second row begins with padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :PADDED] = 0
    return mask
