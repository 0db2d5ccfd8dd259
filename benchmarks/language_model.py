"""The language model of `benchmarks/language.py`: a small Llama over byte-pair tokens, on Python's standard library.

    python benchmarks/language_model.py --out runs/language [--minutes 45]

Code is the library's source; prose its language reference (pydoc_data). A twentieth of the files and topics is held out, by a hash of
their names, so that a model trained under another version of Python holds out the same ones.
"""

import argparse
import math
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 4096, 256
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}


def texts(held_out: bool) -> tuple[list[str], list[str]]:
    """Code and prose."""
    root = Path(os.__file__).parent
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [path for path in files if not LEFT_OUT & set(path.parts)]

    def wanted(name: str) -> bool:
        return (zlib.crc32(name.encode()) % 20 == 7) == held_out

    code = [(root / path).read_text(errors="ignore") for path in files if wanted(path.as_posix())]
    return code, [text for name, text in sorted(topics.items()) if wanted(name)]


def tokenizer(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    code, prose = texts(held_out=False)
    words = tokenizer(iter([*code, *prose]))

    def ids(parts: list[str]) -> torch.Tensor:
        encoded = words(parts)["input_ids"]
        return torch.tensor([token for part in encoded for token in (*part, words.eos_token_id)])

    data, unseen = ids([*code, *prose * 3]), ids([part for kind in texts(held_out=True) for part in kind])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(options.device)
    print(f"{len(data):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began, budget, step = time.perf_counter(), 60 * options.minutes, 0

    def batch(source: torch.Tensor, n: int) -> torch.Tensor:
        at = torch.randint(len(source) - CONTEXT, (n, 1)) + torch.arange(CONTEXT)
        return source[at].to(options.device)

    while (done := (time.perf_counter() - began) / budget) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        x = batch(data, options.batch)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device != "cpu"):
            loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            with torch.no_grad():
                x = batch(unseen, 16)
                print(
                    f"{step:6} {done:4.0%} train {loss:.3f} held out {model(input_ids=x, labels=x).loss:.3f}",
                    flush=True,
                )
        step += 1
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    words.save_pretrained(options.out)


if __name__ == "__main__":
    main()
