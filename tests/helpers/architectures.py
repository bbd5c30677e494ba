"""Configurations of every architecture that the documented table claims; a script prints the table.

helpers/small_models.py builds them.
"""

from __future__ import annotations

from typing import Any

N_VOCAB = 97
BASE = dict(
    vocab_size=N_VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GPT = dict(
    vocab_size=N_VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    original_max_position_embeddings=64,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 2.0, 3.0, 4.0],
)
MLA = dict(
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
WINDOWED = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
THETAS = dict(
    full_attention=dict(rope_type="default", rope_theta=1000000.0),
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
)

# name in the README's table -> (family in transformers, config)
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", BASE),
    "Llama, llama3 scaling": ("Llama", {**BASE, "rope_parameters": LLAMA3}),
    "Llama, YaRN": ("Llama", {**BASE, "rope_parameters": YARN}),
    "Mistral, sliding window": ("Mistral", {**BASE, "sliding_window": 16}),
    "Mixtral": ("Mixtral", {**BASE, "num_local_experts": 2}),
    "Qwen2": ("Qwen2", BASE),
    "Qwen3": ("Qwen3", {**BASE, "head_dim": 8}),
    "Gemma 2": ("Gemma2", {**BASE, "head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED}),
    "Gemma 3": (
        "Gemma3",
        {**BASE, "head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED, "rope_parameters": THETAS},
    ),
    "Cohere": ("Cohere", BASE),
    "Phi": ("Phi", {**BASE, "partial_rotary_factor": 0.5}),
    "Phi-3, longrope": (
        "Phi3",
        {**BASE, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "StableLM": ("StableLm", {**BASE, "partial_rotary_factor": 0.5}),
    "OLMo 2": ("Olmo2", BASE),
    "GPT-NeoX, Pythia": (
        "GPTNeoX",
        {**BASE, "rotary_pct": 0.5, "num_key_value_heads": None},
    ),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "Falcon": (
        "Falcon",
        {
            **BASE,
            "multi_query": True,
            "alibi": False,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "bias": False,
        },
    ),
    "DeepSeek-V3": ("DeepseekV3", {**BASE, **MLA}),
    "DeepSeek-V2": ("DeepseekV2", {**BASE, **MLA, "topk_method": "greedy"}),
}

HEAD = {**BASE, "head_dim": 8}
MOE = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
SSM = dict(
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_d_state=8,
    mamba_expand=2,
    mamba_chunk_size=16,
)
HALF = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    rope_parameters=HALF,
)
MULTIPLIED = {**BASE, "attention_multiplier": 0.1}
GLM = {**HEAD, "partial_rotary_factor": 0.5}
CONVOLUTION = {**BASE, **MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    num_channels=3,
    projection_dim=16,
)
# Of Qwen-VL and GLM-4V, whose configurations take what they don't know.
TOWER = dict(
    VISION,
    depth=1,
    num_heads=2,
    out_hidden_size=32,
    fullatt_block_indexes=[0],
    deepstack_visual_indexes=[0],
    num_position_embeddings=16,
)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
AUDIO = dict(
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=16,
    num_mel_bins=16,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)
VQ = dict(
    embed_dim=16,
    codebook_size=8,
    base_channels=32,
    channel_multiplier=[1],
    num_res_blocks=1,
    attn_resolutions=[],
    latent_channels=16,
)


def seeing(text: str, vision: str | None = None, **others: Any) -> dict[str, Any]:
    """Configuration of a model that sees pictures; it is given text alone."""
    kinds = {"model_type": text}, {} if vision is None else {"model_type": vision}
    whole = dict(text_config=BASE | kinds[0], vision_config=VISION | kinds[1])
    return whole | dict(image_token_index=96) | others


def hearing(text: str, audio: str) -> dict[str, Any]:
    kinds = {"model_type": text}, {"model_type": audio}
    return dict(text_config=BASE | kinds[0], audio_config=AUDIO | kinds[1], audio_token_id=96)


# The long tail: name -> (family, config, layers with RoPE of the two)
MORE: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "Apertus": ("Apertus", BASE, (0, 1)),
    "Arcee": ("Arcee", BASE, (0, 1)),
    "AudioFlamingo 3": ("AudioFlamingo3", hearing("qwen2", "audioflamingo3_encoder"), (0, 1)),
    "Bamba": ("Bamba", {**BASE, **SSM, "attn_layer_indices": [1]}, (1,)),
    "BitNet": ("BitNet", BASE, (0, 1)),
    "Cohere 2": ("Cohere2", {**BASE, **WINDOWED}, (0,)),
    "Emu3": (
        "Emu3",
        dict(text_config=BASE, vq_config=VQ, vocabulary_map={"<image>": 96}),
        (0, 1),
    ),
    "Ernie 4.5": ("Ernie4_5", HEAD, (0, 1)),
    "Ernie 4.5, MoE": ("Ernie4_5_Moe", {**BASE, **MOE, "moe_num_experts": 4, "moe_k": 2}, (0, 1)),
    "EXAONE 4": ("Exaone4", {**BASE, **WINDOWED}, (0,)),
    "Falcon-H1": ("FalconH1", {**HEAD, **SSM, "mamba_d_ssm": 64}, (0, 1)),
    "FlexOlmo": ("FlexOlmo", {**BASE, **MOE}, (0, 1)),
    "Gemma": ("Gemma", HEAD, (0, 1)),
    "Gemma 3 with pictures": (
        "Gemma3",
        dict(
            text_config={**HEAD, "query_pre_attn_scalar": 8, **WINDOWED, "rope_parameters": THETAS},
            vision_config=VISION,
        ),
        (0, 1),
    ),
    "GLM": ("Glm", GLM, (0, 1)),
    "GLM-4": ("Glm4", GLM, (0, 1)),
    "GLM-4 MoE": ("Glm4Moe", {**BASE, **MLA, "head_dim": 8}, (0, 1)),
    "GLM-4 MoE Lite": (
        "Glm4MoeLite",
        {**BASE, **MLA, "mlp_layer_types": ["dense", "sparse"]},
        (0, 1),
    ),
    "GLM-ASR": ("GlmAsr", hearing("llama", "glmasr_encoder"), (0, 1)),
    "gpt-oss": ("GptOss", {**HEAD, **MOE, **WINDOWED, "rope_parameters": YARN}, (0, 1)),
    "Granite": ("Granite", MULTIPLIED, (0, 1)),
    "Granite MoE": ("GraniteMoe", {**MULTIPLIED, **MOE}, (0, 1)),
    "Granite hybrid": (
        "GraniteMoeHybrid",
        {
            **MULTIPLIED,
            **MOE,
            **SSM,
            "layer_types": ["mamba", "attention"],
            "position_embedding_type": "rope",
            "shared_intermediate_size": 32,
        },
        (1,),
    ),
    "Idefics 3": ("Idefics3", seeing("llama", scale_factor=1, image_token_id=96), (0, 1)),
    "Jais 2": ("Jais2", BASE, (0, 1)),
    "LFM2": ("Lfm2", CONVOLUTION, (1,)),
    "LFM2 MoE": ("Lfm2Moe", CONVOLUTION, (1,)),
    "LLaVA": ("Llava", seeing("llama", "clip_vision_model"), (0, 1)),
    "LLaVA-NeXT": ("LlavaNext", seeing("llama", "clip_vision_model"), (0, 1)),
    "LLaVA-OneVision": (
        "LlavaOnevision",
        seeing("qwen2", "siglip_vision_model", video_token_index=95),
        (0, 1),
    ),
    "MiniMax-M2": ("MiniMaxM2", {**HEAD, **MOE, "rotary_dim": 4}, (0, 1)),
    "Ministral 3": ("Ministral3", HEAD, (0, 1)),
    "Mistral 3 with pictures": ("Mistral3", seeing("mistral", "pixtral"), (0, 1)),
    "MusicFlamingo": ("MusicFlamingo", hearing("qwen2", "musicflamingo_encoder"), (0, 1)),
    "Nemotron": ("Nemotron", HEAD, (0, 1)),
    "OLMo": ("Olmo", BASE, (0, 1)),
    "OLMo 3": ("Olmo3", {**BASE, **WINDOWED}, (0, 1)),
    "OLMoE": ("Olmoe", {**BASE, **MOE}, (0, 1)),
    "Qwen2 MoE": ("Qwen2Moe", {**BASE, **MOE}, (0, 1)),
    "Qwen2-Audio": ("Qwen2Audio", hearing("qwen2", "qwen2_audio_encoder"), (0, 1)),
    "Qwen3 MoE": ("Qwen3Moe", {**HEAD, **MOE}, (0, 1)),
    "Qwen3-Next": ("Qwen3Next", {**HEAD, **MOE, **DELTA}, (1,)),
    "Qwen3.5": ("Qwen3_5", {**HEAD, **DELTA}, (1,)),
    "Qwen3.5 MoE": ("Qwen3_5Moe", {**HEAD, **MOE, **DELTA}, (1,)),
    "Seed-OSS": ("SeedOss", HEAD, (0, 1)),
    "SmolLM3": ("SmolLM3", {**BASE, "no_rope_layers": [1, 0]}, (0,)),
    "Starcoder 2, sliding window": ("Starcoder2", {**BASE, "sliding_window": 16}, (0, 1)),
    "VaultGemma": ("VaultGemma", {**HEAD, "query_pre_attn_scalar": 8, **WINDOWED}, (0, 1)),
    "Youtu": ("Youtu", {**BASE, **MLA}, (0, 1)),
}

# name -> (family, config, why, in words that the error has)
NEVER = "TransformerLens does not offer them"
SPARSE = "keys chosen by content (sparse attention)"
UNSEEN = "MRoPE (positions in time, height and width), not RoPE"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "AFMoE": ("Afmoe", {**HEAD, **MOE, "num_dense_layers": 1, **WINDOWED}, NEVER),
    "CodeGen": (
        "CodeGen",
        {**GPT, "rotary_dim": 4},
        "attention in TransformerLens does not expose its rotated queries",
    ),
    "DeepSeek-V4": ("DeepseekV4", {**BASE, **MLA}, SPARSE),
    "Gemma 4": ("Gemma4", {**HEAD, **WINDOWED}, NEVER),
    "GLM-5 (DSA)": (
        "GlmMoeDsa",
        {
            **BASE,
            **MLA,
            "index_topk": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "mlp_layer_types": ["dense", "sparse"],
        },
        SPARSE,
    ),
    "GLM-4V": ("Glm4v", dict(text_config={**HEAD, **MROPE}, vision_config=TOWER), UNSEEN),
    "HRM-Text": ("HrmText", BASE, "no single stack of blocks in TransformerLens"),
    "HunYuan, dense": (
        "HunYuanDenseV1",
        HEAD,
        "normalises its queries and keys after their rotation",
    ),
    "JetMoe": ("JetMoe", {**BASE, **MOE, "kv_channels": 8}, NEVER),
    "Laguna": ("Laguna", {**HEAD, **MOE}, NEVER),
    "Llama 4": (
        "Llama4",
        {**HEAD, "intermediate_size_mlp": 48, "attention_chunk_size": 16, "num_local_experts": 2},
        "attends only to keys of its own chunk of the text",
    ),
    "ModernBERT decoder": ("ModernBertDecoder", {**BASE, "num_key_value_heads": None}, NEVER),
    "Muse Glimmer": ("MuseGlimmer", dict(text_config=HEAD, vision_config=VISION), NEVER),
    "NanoChat": ("NanoChat", BASE, NEVER),
    "OLMo hybrid": ("OlmoHybrid", {**BASE, **DELTA}, NEVER),
    "Phi-3.5-MoE": ("Phimoe", {**BASE, **MOE}, NEVER),
    "Qwen2.5-VL": ("Qwen2_5_VL", dict(text_config={**BASE, **MROPE}, vision_config=TOWER), UNSEEN),
    "Qwen3-VL": ("Qwen3VL", dict(text_config={**HEAD, **MROPE}, vision_config=TOWER), UNSEEN),
    "Qwen3-VL MoE": (
        "Qwen3VLMoe",
        dict(text_config={**HEAD, **MOE, **MROPE}, vision_config=TOWER),
        UNSEEN,
    ),
    "RecurrentGemma": (
        "RecurrentGemma",
        {
            **HEAD,
            "lru_width": 32,
            "attention_window_size": 16,
            "block_types": ["recurrent", "attention"],
        },
        "TransformerLens shows no attention in layers",
    ),
    "Zamba 2": (
        "Zamba2",
        {
            **BASE,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "use_mem_rope": True,
            "chunk_size": 16,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "use_shared_attention_adapter": False,
        },
        "no position embedding that TransformerLens knows of",
    ),
}
# With RoPE, but built from nothing that the tests have.
UNTESTED = {
    "its code is not in transformers": (
        "Baichuan, BD3LM, Dream, EXAONE 3, Gidd, InternLM 2, LLaDA, LLaDA 2, OpenELM, Ouro, "
        "Qwen 1, Raven"
    ),
    "needs torchvision or timm": "Gemma 3n, Qwen3.5 with pictures",
    "has an encoder beside the decoder, so that its layers have no numbers": "T5Gemma, T5Gemma 2",
}

# name -> (family, config, what its positions are)
OTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT-2": ("GPT2", GPT, "learned"),
    "BLOOM": ("Bloom", dict(vocab_size=N_VOCAB, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "OPT": (
        "OPT",
        {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None},
        "learned",
    ),
    "T5": (
        "T5",
        dict(vocab_size=N_VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "relative",
    ),
    "Mamba": ("Mamba", dict(vocab_size=N_VOCAB, hidden_size=32, num_hidden_layers=2), "recurrent"),
}


def rotary_layers(name: str) -> tuple[int, ...]:
    """Of layers 0 and 1, those that turn queries and keys."""
    return MORE[name][2] if name in MORE else (0, 1)


def table() -> str:
    """Every architecture that the Bridge 4 loads with RoPE, as the documentation shows it."""
    rows: dict[str, list[str]] = {}
    for name in (*ROTARY, *MORE):
        still = "" if rotary_layers(name) == (0, 1) else ", layers without RoPE or attention as NaN"
        rows.setdefault(f"scored{still}", []).append(name)
    for name, (_, _, reason) in REFUSED.items():
        whose = "rotated queries and keys never seen: " if reason == NEVER else ""
        rows.setdefault(f"refused: {whose}{reason}", []).append(name)
    rows |= {f"not tested: {why}": [names] for why, names in UNTESTED.items()}
    head = ["| on the Bridge 4 | architectures |", "|---|---|"]
    return "\n".join(head + [f"| {what} | {'; '.join(names)} |" for what, names in rows.items()])


if __name__ == "__main__":
    print(table())
