"""Every decoder-only architecture of the installed transformers, as small as it can be built.

``TINY`` shrinks whatever a configuration calls its sizes; ``SPECIAL`` holds what single architectures want besides.
"""

import inspect
import re

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, CONTEXT, LARGEST = 60, 96, 2_000_000

TINY = {  # the first pattern that matches the whole name of an attribute gives its value
    r"vocab_size|vocab_size_per_layer_input|n_vocab": VOCABULARY,
    r"hidden_size|d_model|n_embd|dim|embedding_size|d_embed|emb_dim|word_embed_proj_dim|dim_model": 32,
    r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|encoder_layers": 4,
    r"num_attention_heads|n_heads?|decoder_attention_heads|encoder_attention_heads|num_heads": 4,
    r"(swa_)?num_key_value_heads|num_kv_heads|num_global_key_value_heads|multi_query_num_heads": 2,
    r"(swa_|global_|attention_)?(head_dim|v_head_dim)|d_kv|kv_channels|attention_hidden_size_per_head": 8,
    r"qk_nope_head_dim|qk_rope_head_dim|index_head_dim|dim_head": 8,
    r"qk_head_dim": 16,
    r"rotary_dim": 4,
    r".*(intermediate|ffn|ffw?_hidden|mlp_hidden|feedforward)_?(size|dim)s?|n_inner|d_ff|dim_ff|ffn_dim|d_inner": 64,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|moe_k|index_topk": 2,
    r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace": 1,
    r".*lora_rank|.*_rank": 8,
    r".*sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size": 8,
    r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|seq_length|block_size": CONTEXT,
    r"mamba_d_state|state_size|ssm_state_size|mamba_d_ssm": 8,
    r"hidden_size_per_layer_input": 8,
}
MLA = dict(num_key_value_heads=4)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_expand=2)
HALF_AND_HALF = ["sliding_attention", "full_attention"] * 2
SPECIAL: dict[str, dict] = {  # what single architectures want besides
    "bailing_hybrid": dict(
        layer_types=["linear_attention", "full_attention"] * 2, linear_head_dim=8, linear_num_heads=4
    ),
    "bamba": MAMBA | dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(
        layer_types=HALF_AND_HALF,
        rope_parameters=dict.fromkeys(HALF_AND_HALF, dict(rope_type="default", rope_theta=1e4)),
    ),
    "ctrl": dict(dff=64),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "gemma3n_text": dict(activation_sparsity_pattern=None, num_kv_shared_layers=0, laurel_rank=8),
    "gemma4_text": dict(per_layer_config=None),
    "gemma4_unified_text": dict(per_layer_config=None),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": MAMBA | dict(layer_types=["linear_attention", "full_attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": dict(expert_ffn_hidden_size=32, ffn_hidden_size=64, zero_expert_num=1),
    "mamba2": dict(num_heads=8, n_groups=1),
    "roc_bert": dict(pronunciation_vocab_size=10, shape_vocab_size=10),
    "xmod": dict(default_language="en_XX", languages=["en_XX"]),
    "zaya": dict(num_experts_per_tok=1),
}
LONG_ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
ROPE = dict(rope_theta=1e4, factor=4.0)
VARIANTS: dict[str, tuple[str, dict]] = {  # options that change what a layer looks at, or what becomes of its states
    "qwen2, windows in the upper layers": ("qwen2", dict(use_sliding_window=True, max_window_layers=2)),
    "qwen3, windows in the upper layers": ("qwen3", dict(use_sliding_window=True, max_window_layers=2)),
    "qwen2_moe, windows": ("qwen2_moe", dict(use_sliding_window=True, max_window_layers=0)),
    "mistral without a window": ("mistral", dict(sliding_window=None)),
    "doge, keeps 8 keys": ("doge", dict(keep_window_size=8)),
    "modernbert-decoder, local": ("modernbert-decoder", dict(local_attention=8)),
    "minimax_m3, sparse": ("minimax_m3_vl_text", dict(index_block_size=4, index_topk_blocks=2)),
    "phi3, long rope": (
        "phi3",
        dict(
            original_max_position_embeddings=24, rope_parameters=LONG_ROPE | dict(original_max_position_embeddings=24)
        ),
    ),
    "llama, dynamic rope": (
        "llama",
        dict(max_position_embeddings=24, rope_parameters=ROPE | dict(rope_type="dynamic")),
    ),
    "llama, linear rope": ("llama", dict(rope_parameters=ROPE | dict(rope_type="linear"))),
    "llama, yarn": ("llama", dict(rope_parameters=ROPE | dict(rope_type="yarn", original_max_position_embeddings=24))),
    "llama, rope of Llama 3": (
        "llama",
        dict(
            rope_parameters=ROPE
            | dict(rope_type="llama3", original_max_position_embeddings=24, low_freq_factor=1.0, high_freq_factor=4.0)
        ),
    ),
    "falcon, alibi": ("falcon", dict(alibi=True)),
    "falcon, new": ("falcon", dict(new_decoder_architecture=True)),
    "falcon, one after the other": ("falcon", dict(parallel_attn=False)),
    "gpt_neox, one after the other": ("gpt_neox", dict(use_parallel_residual=False)),
    "opt, narrow embeddings": ("opt", dict(word_embed_proj_dim=16)),
    "opt, norm afterwards": ("opt", dict(do_layer_norm_before=False)),
    "granite, scaled": (
        "granite",
        dict(logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2),
    ),
    "cohere, scaled": ("cohere", dict(logit_scale=4.0)),
    "gemma2, capped": ("gemma2", dict(final_logit_softcapping=2.0, attn_logit_softcapping=3.0)),
    "gemma3, looks both ways": ("gemma3_text", dict(use_bidirectional_attention=True)),
    "gemma3n, shared keys": (
        "gemma3n_text",
        dict(activation_sparsity_pattern=None, num_kv_shared_layers=2, laurel_rank=8, layer_types=HALF_AND_HALF),
    ),
    "gemma4, shared keys": (
        "gemma4_text",
        dict(per_layer_config=None, num_kv_shared_layers=2, layer_types=HALF_AND_HALF),
    ),
    "gpt_neo, all local": ("gpt_neo", dict(attention_types=[[["local"], 4]])),
    "gpt_neo, all global": ("gpt_neo", dict(attention_types=[[["global"], 4]])),
    "granitemoehybrid, attention only": ("granitemoehybrid", MAMBA | dict(layer_types=["full_attention"] * 4)),
    "jamba, attention only": ("jamba", dict(attn_layer_period=1, attn_layer_offset=0)),
    "lfm2, attention only": ("lfm2", dict(layer_types=["full_attention"] * 4)),
    "mpt without alibi": ("mpt", dict(attn_config=dict(alibi=False))),
    "stablelm, parallel": ("stablelm", dict(use_parallel_residual=True, qk_layernorm=True)),
    "bloom, norm afterwards": ("bloom", dict(apply_residual_connection_post_layernorm=True)),
    "biogpt, scaled": ("biogpt", dict(scale_embedding=False)),
    "gpt2, scaled by layer": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    "gpt_bigcode, many keys": ("gpt_bigcode", dict(multi_query=False)),
    "bert, looks both ways": ("bert", dict(is_decoder=False)),
    "bert-generation, looks both ways": ("bert-generation", dict(is_decoder=False)),
}
AFRESH = (
    r"layer_types|mlp_layer_types|per_layer_config|activation_sparsity_pattern|layers_block_type"  # one entry a layer
)


# Nothing small can be made of these: parts of several models, packages that are not here, sizes that do not shrink.
NOT_BUILT = """blt dbrx dots3_note dots3_note_text emu3 gemma3n gemma4_assistant gemma4_unified_assistant got_ocr2
kimi_linear llama4 mllama musicgen musicgen_melody phi4_multimodal qwen4_exp qwen4_exp_text reformer xlstm zamba zamba2
""".split()


def model_types() -> list[str]:
    """Every model type that transformers has a causal language model for, without those that cannot be built small."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT))


def shrunk(sizes: dict) -> dict:
    """What :data:`TINY` says about these attributes of a configuration, those of configurations inside it included."""
    changes: dict = {}
    for name, value in sizes.items():
        matches = [tiny for pattern, tiny in TINY.items() if re.fullmatch(pattern, name)]
        if isinstance(value, bool):
            continue
        if re.fullmatch(AFRESH, name):
            changes[name] = None
        elif isinstance(value, dict) and name.endswith("config"):
            changes[name] = value | shrunk(value)
        elif matches:
            changes[name] = matches[0]
    return changes


def tiny_config(model_type: str, changes: dict):
    """A small configuration of this type, with these changes."""
    config_class = CONFIG_MAPPING[model_type]
    special = dict(eos_token_id=1, pad_token_id=0, bos_token_id=2) | SPECIAL.get(model_type, {})
    names = dict.fromkeys(inspect.signature(config_class).parameters) | config_class().to_dict()
    if "kv_lora_rank" in names:  # latent attention has no groups
        special = MLA | special
    if "is_decoder" in names:
        special = dict(is_decoder=True) | special
    return config_class(**shrunk(names) | special | changes)


def tiny_model(name: str):
    """A random float32 model of this type or variant, with matrices large enough that its texts vary."""
    config = tiny_config(*VARIANTS[name]) if name in VARIANTS else tiny_config(name, {})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"has {size:,} parameters however its configuration is shrunk")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None  # texts run on to their full length
    return model.eval().requires_grad_(False)
