"""A language model of transformers through `generate`: the same tokens, in fewer forwards.

pip install "parallel-decode[transformers]"
"""

from typing import Any

import torch
import transformers

from parallel_decode.adapters.causal_lm import parallel_generate

torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
model = transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
# or AutoModelForCausalLM.from_pretrained(...)
prompt = torch.randint(3, 256, (1, 40))
options: dict[str, Any] = {"max_new_tokens": 80, "pad_token_id": 0, "eos_token_id": None}

for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.3}):
    torch.manual_seed(1)
    expected = model.generate(prompt, **options, **how)
    torch.manual_seed(1)
    report: dict[str, Any] = {}
    found = model.generate(prompt, **options, **how, custom_generate=parallel_generate, report=report)
    print(how, "the same tokens:", torch.equal(found, expected))
    print(f"  {report['tokens']} tokens in {report['passes']} passes, {report['tokens_per_forward']:.1f} a forward")
