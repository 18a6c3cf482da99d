"""The zoo: one tiny random configuration for each family of models that people export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import nn

Kind = Literal["decoder", "encoder", "seq2seq", "vision"]

DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"}


@dataclass(frozen=True)
class Family:
    """A model family: `make` builds it with random weights.

    Attributes:
        config: name of the transformers configuration class, without "Config".
        kind: what its inputs are.
        extra: configuration values beside those of the kind.
        base: the values that replace the kind's own.
        cls: the model class, where it is not that of the kind.
        masks: of its layers' self attention, in a call with ids alone.
        bias: what is added to the scores, as `str(bias)` begins.
        eager_only: transformers has no SDPA for it.
        skip: modes that its own code cannot be exported in, each with the reason.
    """

    config: str
    kind: Kind = "decoder"
    extra: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    cls: str = ""
    masks: tuple[str, ...] = ()
    bias: str = ""
    eager_only: bool = False
    skip: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.masks:
            object.__setattr__(self, "masks", ("causal",) if self.kind == "decoder" else ("full",))

    @property
    def is_usual(self) -> bool:
        """Whether it has one mask, no bias and every mode: it differs from others only in what is around attention."""
        return self.kind in ("decoder", "encoder") and len(self.masks) == 1 and not (self.bias or self.skip)

    def make(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
        defaults = {"decoder": DECODER, "encoder": ENCODER, "seq2seq": SEQ2SEQ, "vision": VISION}[self.kind]
        values = (self.base if self.base is not None else defaults) | self.extra
        if len(self.masks) == 1 and "layer_types" not in self.extra:  # all layers are alike
            values |= dict.fromkeys(LAYERS & values.keys(), 1)
        config = getattr(transformers, f"{self.config}Config")(**values)
        auto = {
            "decoder": "AutoModelForCausalLM",
            "encoder": "AutoModel",
            "seq2seq": "AutoModelForSeq2SeqLM",
            "vision": "AutoModel",
        }
        torch.manual_seed(0)
        if self.cls:
            config._attn_implementation = attention
            model = getattr(transformers, self.cls)._from_config(config, attn_implementation=attention, dtype=dtype)
        else:
            model = getattr(transformers, auto[self.kind]).from_config(config, attn_implementation=attention, dtype=dtype)
        return model.eval()  # type: ignore[no-any-return]


WINDOW_CACHE = (
    "a windowed StaticCache layer keeps its length as a Python number: a program exported from it serves one position"
)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "qwen2": Family("Qwen2"),
    "qwen2-window": Family(
        "Qwen2",
        extra={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        masks=("causal", "window(5)"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "qwen3": Family("Qwen3", extra={"head_dim": 8}),
    "mistral": Family(
        "Mistral",
        extra={"sliding_window": 5, "head_dim": 8},
        masks=("window(5)",),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "mixtral": Family(
        "Mixtral",
        extra={"num_local_experts": 4, "sliding_window": 5},
        masks=("window(5)",),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "qwen3-moe": Family("Qwen3Moe", extra=MOE | {"head_dim": 8}),
    "gemma": Family("Gemma", extra={"head_dim": 8}),
    "gemma2": Family(
        "Gemma2",
        extra={"head_dim": 8, "sliding_window": 5},
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
        eager_only=True,
    ),
    "gemma3": Family(
        "Gemma3Text",
        extra={"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "llama4": Family(
        "Llama4Text",
        extra={
            "head_dim": 8,
            "attention_chunk_size": 6,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        masks=("causal & chunked(6)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "phi": Family("Phi"),
    "phi3": Family("Phi3"),
    "phi3-window": Family(
        "Phi3",
        extra={"sliding_window": 5},
        masks=("window(5)",),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "starcoder2": Family(
        "Starcoder2",
        extra={"sliding_window": 5},
        masks=("window(5)",),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "olmo2": Family("Olmo2"),
    "olmo3": Family(
        "Olmo3",
        extra={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "smollm3": Family("SmolLM3"),
    "cohere2": Family(
        "Cohere2",
        extra={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "gpt-oss": Family(
        "GptOss",
        extra={
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
        eager_only=True,
    ),
    "gpt2": Family("GPT2", base=GPT),
    "gptj": Family("GPTJ", base=GPT | {"rotary_dim": 4}, eager_only=True),
    "gpt-neox": Family("GPTNeoX", base=ENCODER),
    "opt": Family("OPT", base=ENCODER | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": Family(
        "Bloom",
        base={"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        bias="alibi",
        eager_only=True,
        skip=dict.fromkeys(("ids+positions", "ids+both"), "it takes no position_ids"),
    ),
    "mpt": Family(
        "Mpt",
        base={"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        bias="alibi",
        eager_only=True,
        skip=dict.fromkeys(("ids+positions", "ids+both"), "it takes no position_ids")
        | dict.fromkeys(("static-prefill", "static-step"), "it reads the length of the cache as a number"),
    ),
    "falcon": Family("Falcon", base=ENCODER | {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "falcon-alibi": Family(
        "Falcon", base=ENCODER | {"multi_query": True, "new_decoder_architecture": False, "alibi": True}, bias="alibi"
    ),
    "nemotron": Family("Nemotron"),
    "ministral": Family(
        "Ministral",
        extra={"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "exaone4": Family(
        "Exaone4",
        extra={"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        masks=("window(5)", "causal"),
        skip=dict.fromkeys(("static-prefill", "static-step"), WINDOW_CACHE),
    ),
    "ernie4.5": Family("Ernie4_5", extra={"head_dim": 8}),
    "lfm2": Family(
        "Lfm2",
        extra={"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
        skip=dict.fromkeys(("static-prefill", "static-step"), "its convolution layers keep no keys and values"),
    ),
    "apertus": Family("Apertus"),
    "granite": Family("Granite"),
    "stablelm": Family("StableLm"),
    "glm": Family("Glm", extra={"head_dim": 8}),
    "glm4": Family("Glm4", extra={"head_dim": 8}),
    "helium": Family("Helium", extra={"head_dim": 8}),
    "arcee": Family("Arcee", extra={"head_dim": 8}),
    "hunyuan": Family("HunYuanDenseV1", extra={"head_dim": 8}),
    "deepseek-v3": Family(
        "DeepseekV3",
        extra={
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "persimmon": Family("Persimmon", base=ENCODER),
    "codegen": Family("CodeGen", base=GPT | {"rotary_dim": 4, "n_ctx": 256}, eager_only=True),
    "gpt-bigcode": Family("GPTBigCode", base=GPT),
    "xglm": Family(
        "XGLM",
        base={
            "vocab_size": 64,
            "d_model": 32,
            "num_layers": 1,
            "attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 256,
        },
        eager_only=True,
    ),
    "biogpt": Family(
        "BioGpt",
        base=ENCODER,
        skip=dict.fromkeys(("static-prefill", "static-step"), "it slices its positions by a value of the cache"),
    ),
    "ctrl": Family("CTRL", base=GPT | {"dff": 64}),
    "bert": Family("Bert", "encoder"),
    "bert-decoder": Family("Bert", "decoder", base=ENCODER | {"is_decoder": True}, cls="BertLMHeadModel"),
    "distilbert": Family(
        "DistilBert", "encoder", base={"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    ),
    "roberta": Family("Roberta", "encoder"),
    "xlm-roberta": Family("XLMRoberta", "encoder"),
    "camembert": Family("Camembert", "encoder"),
    "albert": Family("Albert", "encoder", extra={"embedding_size": 16}),
    "electra": Family("Electra", "encoder", extra={"embedding_size": 16}),
    "mpnet": Family("MPNet", "encoder", bias="relative", eager_only=True),
    "esm": Family("Esm", "encoder", extra={"position_embedding_type": "rotary", "token_dropout": False}),
    "deberta": Family(
        "Deberta",
        "encoder",
        extra={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        bias="dense(computed",
        eager_only=True,
    ),
    "deberta-v2": Family(
        "DebertaV2",
        "encoder",
        extra={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        bias="dense(computed",
        eager_only=True,
    ),
    "modernbert": Family(
        "ModernBert",
        "encoder",
        extra={"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        masks=("full", "local(3, 3)"),
    ),
    "nomic-bert": Family("NomicBert", "encoder"),
    "eurobert": Family("EuroBert", "encoder"),
    "clip-text": Family(
        "CLIPText", "encoder", cls="CLIPTextModel", masks=("causal",), skip={"embeds": "it takes no inputs_embeds"}
    ),
    "vit": Family("ViT", "vision"),
    "siglip-vision": Family("SiglipVision", "vision", cls="SiglipVisionModel"),
    "dinov2": Family("Dinov2", "vision", base={k: v for k, v in VISION.items() if k != "intermediate_size"}),
    "t5": Family("T5", "seq2seq", base=T5, bias="relative"),
    "mt5": Family("MT5", "seq2seq", base=T5 | {"num_layers": 1}, bias="relative"),
    "bart": Family("Bart", "seq2seq"),
    "mbart": Family("MBart", "seq2seq"),
    "marian": Family("Marian", "seq2seq"),
    "m2m100": Family("M2M100", "seq2seq"),
    "whisper": Family(
        "Whisper",
        "seq2seq",
        extra={
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        cls="WhisperForConditionalGeneration",
    ),
}
