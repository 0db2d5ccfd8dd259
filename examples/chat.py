"""A conversation with a language model: one key-value cache for all turns, tokens as they become final.

pip install "parallel-decode[transformers]"
"""

from typing import Any

import torch
import transformers

from parallel_decode.adapters.causal_lm import parallel_generate

torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
model: Any = transformers.LlamaForCausalLM(config)  # or your own: AutoModelForCausalLM.from_pretrained(...)
model.eval()


class Characters:
    """In place of a tokenizer."""

    def decode(self, ids: torch.Tensor, **options: object) -> str:
        return "".join(chr(32 + int(token) % 95) for token in ids)


tokenizer, cache = Characters(), transformers.DynamicCache(config=config)
said = torch.zeros(1, 0, dtype=torch.long)
for turn in ("What is a fixed point?", "And how fast does one get there?"):
    said = torch.cat([said, torch.tensor([[ord(letter) - 32 for letter in turn]])], 1)
    print(f"> {turn}")
    report: dict[str, Any] = {}
    said = model.generate(
        said,
        attention_mask=torch.ones_like(said),
        cache=cache,  # (before transformers 5.24: past_key_values) holds the turns before, left as generate leaves it
        do_sample=False,
        max_new_tokens=48,
        pad_token_id=0,
        streamer=transformers.TextStreamer(tokenizer, skip_prompt=True),  # type: ignore[arg-type]
        custom_generate=parallel_generate,
        report=report,
    )
    print(f"({report['tokens']} tokens in {report['passes']} passes; the cache holds {cache.get_seq_length()})\n")
