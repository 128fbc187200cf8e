"""What modules are called in Wan's own code, which ComfyUI and kohya's tools keep, and what they are called here.

Our names are diffusers'. Kohya's are Wan's with every dot an underscore, so a name is looked up without its dots.
"""

import re

_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
"""By diffusers' scripts/convert_wan_to_diffusers.py."""
_IN_BLOCK = re.compile(r"blocks[._](\d+)[._](.+)")


def _by_spelling(names: dict[str, str], side: int) -> dict[str, str]:
    """Either spelling of a name, its dots as underscores -> Wan's (0) or ours (1)."""
    return {spelling.replace(".", "_"): pair[side] for pair in names.items() for spelling in pair}


_WANS, _OURS = ((_by_spelling(_BLOCK, side), _by_spelling(_OUTSIDE, side)) for side in (0, 1))


def our_name(spelling: str) -> str | None:
    """The module that Wan's code, kohya's tools or diffusers call `spelling`; None for a name of none of them."""
    return _found(spelling, _OURS)


def wan_name(module: str) -> str | None:
    """Wan's own name of our module; None where Wan has no such module."""
    return _found(module, _WANS)


def _found(spelling: str, names: tuple[dict[str, str], dict[str, str]]) -> str | None:
    in_block, outside = names
    match = _IN_BLOCK.fullmatch(spelling)
    if match is None:
        return outside.get(spelling.replace(".", "_"))
    leaf = in_block.get(match[2].replace(".", "_"))
    return None if leaf is None else f"blocks.{match[1]}.{leaf}"
