"""Tiny random models of transformers' families: some ten thousand parameters each, made in milliseconds.

`DECODERS` holds the language models whose blocks can be sampled, with what a test must know of each; `t5` and
`roberta` are for LoRA-FA only. Equal calls give equal weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61
HIDDEN = 32
LAYERS = 3
IMAGE_TOKEN = 60


def build(model_name: str, config_name: str, seed: int = 0, **settings: Any) -> Any:
    """Return a random model in training mode, its attention in plain PyTorch."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        # Norms off 1 and biases off 0, so that a vector lost on the way shows in the logits.
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(torch.randn_like(param) * 0.1)
    return model.train()


def common(**changes: Any) -> dict[str, Any]:
    """Return the settings that most configurations share."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip


def llama(layers: int = LAYERS, tied: bool = False, **changes: Any) -> Any:
    """Return a Llama."""
    settings = common(num_hidden_layers=layers, tie_word_embeddings=tied, **changes)
    return build("LlamaForCausalLM", "LlamaConfig", **settings)


def gemma3(layers: int = LAYERS, **changes: Any) -> Any:
    """Return a Gemma 3: its embedding scales what it looks up, tied."""
    settings = common(num_hidden_layers=layers, head_dim=8, sliding_window=16, tie_word_embeddings=True, **changes)
    return build("Gemma3ForCausalLM", "Gemma3TextConfig", **settings)


def gpt2(layers: int = LAYERS) -> Any:
    """Return a GPT-2 without dropout: weights stored transposed, learned positions, tied."""
    return build(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=layers, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def falcon() -> Any:
    """Return a Falcon without dropout: linears of its own class, which no slot can stand in for, one norm."""
    return build(
        "FalconForCausalLM", "FalconConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, multi_query=True, bias=True, alibi=False, bos_token_id=1, eos_token_id=2,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def opt() -> Any:
    """Return an OPT without dropout whose embeddings are narrower than its blocks (projections around them)."""
    return build(
        "OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=True,
        dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def gpt_neox() -> Any:
    """Return a GPT-NeoX: attention and MLP side by side, untied."""
    settings = common()
    del settings["num_key_value_heads"]
    return build("GPTNeoXForCausalLM", "GPTNeoXConfig", **settings)


def mixtral() -> Any:
    """Return a Mixtral: experts in fused 3-D weights, a router without a linear layer."""
    settings = common(num_local_experts=3, num_experts_per_tok=2, intermediate_size=16)
    return build("MixtralForCausalLM", "MixtralConfig", **settings)


def phimoe() -> Any:
    """Return a Phi-3.5-MoE: its router is a linear layer with a forward of its own."""
    settings = common(num_local_experts=10, num_experts_per_tok=2, intermediate_size=16)
    return build("PhimoeForCausalLM", "PhimoeConfig", **settings)


def llama4() -> Any:
    """Return a Llama 4: routers with a forward of their own, experts in fused weights in every other block."""
    settings = common(
        num_local_experts=10, num_experts_per_tok=1, intermediate_size=16, intermediate_size_mlp=48, head_dim=8,
        moe_layers=[1], num_hidden_layers=2,
    )  # fmt: skip
    return build("Llama4ForCausalLM", "Llama4TextConfig", **settings)


def llava() -> Any:
    """Return a LLaVA: a CLIP tower with as many layers as the Llama beside it, and a projector."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=8,
        patch_size=4, projection_dim=16,
    )  # fmt: skip
    return build(
        "LlavaForConditionalGeneration", "LlavaConfig", vision_config=vision,
        text_config=transformers.LlamaConfig(**common()), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def roberta_classifier() -> Any:
    """Return a RoBERTa without dropout that classifies sequences into two."""
    return build("RobertaForSequenceClassification", "RobertaConfig", **_encoder(num_labels=2))


def roberta_masked() -> Any:
    """Return a RoBERTa without dropout with its masked language model head, tied."""
    return build("RobertaForMaskedLM", "RobertaConfig", **_encoder())


def _encoder(**changes: Any) -> dict[str, Any]:
    settings = common(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1, bos_token_id=0, **changes
    )
    del settings["num_key_value_heads"]
    return settings


def t5() -> Any:
    """Return a T5 without dropout: encoder and decoder stacks of equal length, one shared table."""
    return build(
        "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=48,
        num_layers=LAYERS, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A decoder family: how to make one, where its blocks are, and which parameters stand around them.

    The names are the parameters' own in `named_parameters()`; `foreign` are prefixes of what is no language part.
    """

    make: Callable[[], Any]
    path: str
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    foreign: tuple[str, ...] = field(default=())


LLAMA_LIKE = ("model.layers", ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight"))
TIED_LLAMA_LIKE = ("model.layers", ("model.embed_tokens.weight",), ("model.norm.weight",))

DECODERS: dict[str, Family] = {
    "llama": Family(llama, *LLAMA_LIKE),
    "llama-tied": Family(lambda: llama(tied=True), *TIED_LLAMA_LIKE),
    "mistral": Family(lambda: build("MistralForCausalLM", "MistralConfig", **common(sliding_window=8)), *LLAMA_LIKE),
    "qwen2": Family(
        lambda: build("Qwen2ForCausalLM", "Qwen2Config", **common(tie_word_embeddings=True)), *TIED_LLAMA_LIKE
    ),
    "qwen3": Family(
        lambda: build("Qwen3ForCausalLM", "Qwen3Config", **common(head_dim=8, tie_word_embeddings=False)), *LLAMA_LIKE
    ),
    "gemma2": Family(
        lambda: build("Gemma2ForCausalLM", "Gemma2Config", **common(head_dim=8, sliding_window=8)), *TIED_LLAMA_LIKE
    ),
    "gemma3": Family(
        lambda: build("Gemma3ForCausalLM", "Gemma3TextConfig", **common(head_dim=8, sliding_window=8)), *TIED_LLAMA_LIKE
    ),
    "phi3": Family(lambda: build("Phi3ForCausalLM", "Phi3Config", **common(tie_word_embeddings=False)), *LLAMA_LIKE),
    "gpt2": Family(
        gpt2,
        "transformer.h",
        ("transformer.wte.weight", "transformer.wpe.weight"),
        ("transformer.ln_f.weight", "transformer.ln_f.bias"),
    ),
    "gpt-neox": Family(
        gpt_neox,
        "gpt_neox.layers",
        ("gpt_neox.embed_in.weight",),
        ("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "lm_head.weight"),
    ),
    "opt": Family(
        opt,
        "model.decoder.layers",
        ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
        (
            "model.decoder.project_out.weight",
            "model.decoder.project_in.weight",
            "model.decoder.final_layer_norm.weight",
            "model.decoder.final_layer_norm.bias",
        ),
    ),
    "falcon": Family(
        falcon,
        "transformer.h",
        ("transformer.word_embeddings.weight",),
        ("transformer.ln_f.weight", "transformer.ln_f.bias"),
    ),
    "mixtral": Family(mixtral, *LLAMA_LIKE),
    "llava": Family(
        llava,
        "model.language_model.layers",
        ("model.language_model.embed_tokens.weight",),
        ("model.language_model.norm.weight", "lm_head.weight"),
        ("model.vision_tower.", "model.multi_modal_projector."),
    ),
}


@dataclass(frozen=True)
class Adapted:
    """A model for LoRA-FA: how to make one, a batch it trains on, and the names of a new head's parameters."""

    make: Callable[[], Any]
    batch: Callable[[], dict[str, Tensor]]
    head: tuple[str, ...] = ()


def classification() -> dict[str, Tensor]:
    """Return a batch of random tokens with a class for each row."""
    return {"input_ids": tokens()["input_ids"], "labels": torch.tensor([0, 1])}


def llama_classifier() -> Any:
    """Return a Llama that classifies sequences into two."""
    return build("LlamaForSequenceClassification", "LlamaConfig", **common(num_labels=2))


def tokens(rows: int = 2, columns: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch of random tokens that are their own labels; special tokens and the image token are left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (rows, columns), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


ADAPTED: dict[str, Adapted] = {
    "roberta-classifier": Adapted(roberta_classifier, classification, ("classifier.",)),
    "llama-classifier": Adapted(llama_classifier, classification, ("score.",)),
    "roberta-masked": Adapted(roberta_masked, tokens),
    "t5": Adapted(t5, tokens),
    **{name: Adapted(family.make, tokens) for name, family in DECODERS.items() if name != "falcon"},
}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """Return the model's logits in evaluation mode, the mode as it was afterwards."""
    training = model.training
    model.eval()
    inputs = dict(batch or tokens(seed=9))
    if not model.config.is_encoder_decoder:
        del inputs["labels"]
    found = model(**inputs).logits
    model.train(training)
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter by name, slots of attached models left out."""
    beside = (".slot", ".basis")
    return {name: param.detach().clone() for name, param in model.named_parameters() if not name.endswith(beside)}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the parameters that are not bit-equal to a snapshot."""
    now = snapshot(model)
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Return what attaching and detaching must leave as it was: module types, keys, identities and flags."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "module identities": {name: id(module) for name, module in model.named_modules()},
        "keys": {name: tuple(value.shape) for name, value in model.state_dict().items()},
        "parameters": {name: (id(param), param.requires_grad) for name, param in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "forwards": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """Take one step on a batch and return its loss."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
