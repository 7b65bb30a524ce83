"""Hugging Face's models at the size of ours, which bench times beside them."""

from types import ModuleType

import torch

from configurator import UserError
from miniglm.interop.hugging_face import shape_of, to_hugging_face
from model import GPT, ModelConfig


def import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install -r requirements-dev.txt"
        ) from None
    return transformers


def hugging_face_model(config: ModelConfig) -> torch.nn.Module:
    """A new GPT-2, Llama or Qwen3 of the settings' shape, without dropout."""
    transformers = import_transformers()
    shape = shape_of(config) | {"bos_token_id": None, "eos_token_id": None}
    shape |= {name: 0.0 for name in ("resid_pdrop", "embd_pdrop") if name in shape}
    their_config = transformers.AutoConfig.for_model(**shape)
    model = transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="sdpa")
    model.loss_type = "ForCausalLM"  # what GPT-2 takes anyway, after a warning
    return model


def with_our_weights(model: GPT) -> torch.nn.Module:
    """The same with the weights of a model of ours, in eval mode."""
    peer = hugging_face_model(model.config)
    weights = to_hugging_face(model)[1]
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}  # a tied one
    return peer.to(model.wte.weight.device).eval()
