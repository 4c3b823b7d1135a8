"""Tiny random models and trees, made the same way wherever a test needs one."""

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa_nb.tree import Tree

EOS, PAD = 4, 0


def random_model(config, seed: int = 0, std: float = 0.3):
    """A frozen float32 model of this architecture with large random matrices, so that its texts vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def small_llama(vocab_size: int = 50, context: int = 96, seed: int = 0, std: float = 0.3, **changes):
    """A two-layer Llama of hidden size 32."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=context, eos_token_id=EOS, pad_token_id=PAD)
    return random_model(LlamaConfig(vocab_size=vocab_size, **(sizes | changes)), seed, std)


def random_tree(K: int, n: int, seed: int = 0, width: int = 4) -> Tree:
    """A random candidate tree at most ``K`` deep with at most ``n`` nodes."""
    source = random.Random(seed)
    paths = {()}
    for _ in range(50 * n):
        if len(paths) == n:
            break
        path = source.choice(sorted(paths)) + (source.randrange(width),)
        if len(path) <= K:
            paths.add(path)
    return Tree.from_paths(paths)


def save(model, tokenizer, folder: Path) -> Path:
    """A model folder as any other."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
