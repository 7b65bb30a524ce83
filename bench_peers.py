"""Hugging Face's models at the size of ours, which bench.py times beside them."""

from types import ModuleType

import torch

from configurator import UserError
from model import GPT, ModelConfig


def import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install -r requirements-dev.txt"
        ) from None
    return transformers


def hugging_face_gpt2(config: ModelConfig) -> torch.nn.Module:
    """A GPT2LMHeadModel of the settings' shape, without dropout."""
    transformers = import_transformers()
    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(shape)
    model.loss_type = "ForCausalLM"  # what it takes anyway, after a warning
    return model


def hugging_face_llama(config: ModelConfig) -> torch.nn.Module:
    """A LlamaForCausalLM of the settings' shape."""
    transformers = import_transformers()
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(shape)


def hugging_face_qwen3(model: GPT) -> torch.nn.Module:
    """A Qwen3ForCausalLM in eval mode, with the weights of a model of our default architecture."""
    transformers = import_transformers()
    c = model.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_weights,
        attn_implementation="sdpa",
    )
    weights = {
        "model.embed_tokens": model.wte.weight,
        "model.norm": model.norm.weight,
        "lm_head": model.lm_head.weight,
    }
    kv = c.n_kv_head * c.head_dim
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.c_attn.weight.split([c.n_embd, kv, kv])
        gate, up = block.mlp.c_fc.weight.chunk(2)
        of_layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.c_proj.weight,
            "self_attn.q_norm": block.attn.q_norm.weight,
            "self_attn.k_norm": block.attn.k_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.c_proj.weight,
            "input_layernorm": block.norm_1.weight,
            "post_attention_layernorm": block.norm_2.weight,
        }
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in of_layer.items()}
    peer = transformers.Qwen3ForCausalLM(config)
    peer.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return peer.to(model.wte.weight.device).eval()


PEERS = {"GPT-2": hugging_face_gpt2, "Llama": hugging_face_llama}
