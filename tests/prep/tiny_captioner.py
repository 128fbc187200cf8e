"""An image-text-to-text model of a few thousand weights, in a folder, that says one text whatever it sees."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WIDTH, PATCH, SIZE = 16, 8, 16
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} <answer>"
)


def tiny_captioner(folder: Path, says: str) -> Path:
    """`says` is a word of its vocabulary, and what its head answers after `<answer>`; after that it ends."""
    words = ["<unk>", "<end>", "<image>", "<answer>", says]
    tokens = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<answer>"]})
    size = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(_config(len(words)))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            # The layers add nothing, so that the head sees the last word alone.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded = torch.nn.functional.normalize(torch.randn(len(words), WIDTH), dim=1)
        model.model.language_model.embed_tokens.weight.copy_(embedded)
        head = torch.zeros(len(words), WIDTH)
        head[4], head[1] = embedded[3], embedded[4]
        model.lm_head.weight.copy_(20 * head)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    return folder


def _config(words: int) -> LlavaConfig:
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    vision = CLIPVisionConfig(hidden_size=WIDTH, image_size=SIZE, patch_size=PATCH, **layers)
    text = LlamaConfig(
        hidden_size=WIDTH, vocab_size=words, num_key_value_heads=2, eos_token_id=1, **layers
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
