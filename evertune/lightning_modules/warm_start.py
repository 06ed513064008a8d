"""An encoder-decoder made of one pretrained encoder, taken twice (Rothe et al., 2020)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from evertune._lightning import rank_zero_info
from evertune.lightning_modules.backbone import Attention, override_dropout, quiet_transformers, remove_pooler
from evertune.utils.pretrained import load_config, load_model


def encoder_decoder(model_name_or_path: str, tokenizer: Any, dropout: float | None, attention: Attention) -> Any:
    """Load an encoder, and the same weights as its decoder; the attention of the decoder to the encoder is new.

    New weights are drawn with the seed of the process (``seed_everything``), so that they are the same on all ranks.

    Args:
        model_name_or_path: Name on the Hugging Face hub, or folder, of a transformer such as BERT.
        tokenizer: Its tokenizer, whose first special token starts a text and whose end token ends it.
        dropout: Replaces every dropout probability; None keeps them.
        attention: Implementation of attention. ``auto`` is the model's own.

    Raises:
        ValueError: If transformers has no decoder of this kind, or the tokenizer has no token to start or end a text.
    """
    from transformers import EncoderDecoderModel

    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if start is None or end is None:
        raise ValueError(
            f"the tokenizer of {model_name_or_path} has no token that starts a text (cls, bos), or none that ends it "
            "(sep, eos), which a decoder needs: use a model that is an encoder-decoder itself"
        )
    reader, writer = _configs(model_name_or_path, dropout)
    given = {} if attention == "auto" else {"attn_implementation": attention}
    settings: dict[str, Any] = {"dtype": torch.get_default_dtype(), "output_loading_info": True, **given}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        encoder, _ = load_model(model_name_or_path, config=reader, **settings)
        try:
            decoder, info = load_model(model_name_or_path, auto_class="AutoModelForCausalLM", config=writer, **settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{model_name_or_path} ({reader.model_type}) cannot be a decoder: {error}") from None
        if not any("crossattention" in name or "encoder_attn" in name for name, _ in decoder.named_modules()):
            raise ValueError(f"{model_name_or_path} ({reader.model_type}) cannot be a decoder: it reads no encoder")
        model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    remove_pooler(model)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    rank_zero_info(
        f"{model_name_or_path} is not an encoder-decoder: it is taken twice, as encoder and as decoder, and "
        f"{len(info['missing_keys'])} weights of the decoder, its attention to the encoder among them, are new"
    )
    return model.train()


def encoder_decoder_skeleton(model_name_or_path: str, dropout: float | None) -> Any:
    """The transformer of :func:`encoder_decoder` without weights, on torch's meta device."""
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    configs = _configs(model_name_or_path, dropout)
    with quiet_transformers(), torch.device("meta"):
        model: Any = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs))
    remove_pooler(model)
    return model.train()


def _configs(model_name_or_path: str, dropout: float | None) -> tuple[Any, Any]:
    """The configurations of the encoder, and of the decoder made of it."""
    reader = load_config(model_name_or_path)
    if dropout is not None:
        override_dropout(reader, dropout)
    writer = copy.deepcopy(reader)
    writer.is_decoder = writer.add_cross_attention = True
    return reader, writer
