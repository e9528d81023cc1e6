"""Writes tests/data: what transformers computes with small random models of every supported family.

    python scripts/make_model_fixtures.py

Needs torch and transformers (made with 2.13.0, CPU, and 5.23.0), which nothing else here needs: run it in an
environment of its own, after a change of families only. The result depends on no random state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from model_fixtures import FOLDER, Fixture, draw_tensor

PROMPT, STEPS = 56, 12
ROWS = np.array([0, 1, 14, 15, 16, 31, 32, 47, 55], np.int32)
BATCH = 256
CLEAR = 0.15
"""Logits by which every greedy token must lead: more than any runner's rounding."""

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4, "rope_parameters": plain(1e4)}),
    "llama-2-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-3": ("Llama", {"rope_parameters": plain(5e5), "eos_token_id": [2, 3]}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32, "eos_token_id": [2, 3, 4]}),
    "smollm2": (
        "Llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": plain(1e5),
        },
    ),
    "mistral-0.1": ("Mistral", {"rope_parameters": plain(1e4), "sliding_window": 96}),
    "mistral-nemo": ("Mistral", {"rope_parameters": plain(1e6), "sliding_window": None, "head_dim": 48}),
    "qwen2": (
        "Qwen2",
        {"rope_parameters": plain(1e6), "tie_word_embeddings": True, "num_attention_heads": 4},
    ),
    "qwen2.5-yarn": ("Qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"rope_parameters": plain(1e6), "head_dim": 32, "tie_word_embeddings": True}),
}


CORPUS = [
    "The quick brown fox jumps over the lazy dog's 12345 bones.\n",
    "naïve café — don't WE'LL\n\n",
    "漢字かな 👋🏽",
]


def main() -> None:
    save_tokenizers()
    for name, (family, settings) in MODELS.items():
        fixture = compute(name, family, COMMON | settings)
        fixture.save()
        print(f"{name}: logits spread {fixture.logits.std():.2f}, greedy {fixture.greedy.tolist()}")


def save_tokenizers() -> None:
    """Small vocabularies inside the tokenizers that transformers makes for Qwen2 and Llama 3."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS * 3, vocab_size=340, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    qwen2 = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges).backend_tokenizer
    # The converter reads Meta's files of byte strings and ranks; here they come from the vocabulary.
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = {bytes(alphabet[one] for one in text): rank for text, rank in model["vocab"].items()}
    TikTokenConverter.load_tiktoken_bpe = staticmethod(lambda _: ranks)
    llama3 = TikTokenConverter(extra_special_tokens=["<|begin_of_text|>"]).converted()
    folder = FOLDER.parent / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    for name, engine in {"qwen2": qwen2, "llama-bpe": llama3}.items():
        (folder / f"{name}.json").write_text(engine.to_str() + "\n")


@torch.no_grad()
def compute(name: str, family: str, settings: dict[str, Any]) -> Fixture:
    """The fixture of one model, in float32, with the first prompt whose greedy tokens lead clearly."""
    config = getattr(transformers, f"{family}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    drawn = {key: draw_tensor(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del drawn["lm_head.weight"]
    model.load_state_dict({key: torch.from_numpy(values) for key, values in drawn.items()}, strict=False)
    model.tie_weights()
    for first in range(0, 100 * BATCH, BATCH):
        found = find_clear_prompt(model, draw_prompts(first, settings["vocab_size"]))
        if found is not None:
            prompt, greedy = np.split(found, [PROMPT])
            logits = logits_of(model, prompt[None])[0, ROWS]
            # Exactly what save_pretrained writes to config.json.
            written = {"architectures": [f"{family}ForCausalLM"]} | config.to_diff_dict()
            return Fixture(name, written, drawn, prompt, ROWS, logits, greedy)
    raise SystemExit(f"{name}: no prompt with clear greedy tokens")


def draw_prompts(first: int, vocabulary: int) -> np.ndarray:
    raw = [np.random.PCG64(seed).random_raw(PROMPT) for seed in range(first, first + BATCH)]
    return (np.array(raw) % np.uint64(vocabulary)).astype(np.int32)


def find_clear_prompt(model: Any, tokens: np.ndarray) -> np.ndarray | None:
    """A prompt and ``STEPS`` varied greedy tokens that all lead by at least ``CLEAR``, if there is one."""
    for _ in range(STEPS):
        if not len(tokens):
            return None
        last = logits_of(model, tokens)[:, -1]
        best = np.sort(last, axis=-1)
        clear = best[:, -1] - best[:, -2] >= CLEAR
        tokens = np.concatenate([tokens, last.argmax(-1)[:, None].astype(np.int32)], axis=1)[clear]
    varied = [row for row in tokens if len(set(row[PROMPT:].tolist())) >= STEPS // 2]
    return varied[0] if varied else None


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    logits: np.ndarray = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    return logits


if __name__ == "__main__":
    main()
