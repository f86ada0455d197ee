"""Train the tokenizer and the weights of `builtin:mini` from scratch.

    python -m quantune.model.mini.pretrain --out DIR

The number of steps is fixed, so that the result does not depend on the machine's speed. Shapes in names: B sequences a
batch, T tokens a sequence.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantune.model.mini.corpus import Corpus, Document, build_corpus
from quantune.model.mini.muon import Muon
from quantune.model.mini.tokenization import BEGIN, END, VOCABULARY, train_tokenizer

SEED = 0
STEPS = 1300
SEQUENCES = 8
LENGTH = 512
PEAK_RATE = 6e-3
WARMUP = 20
DECAY_FROM = 0.4  # the rate is constant up to this share of the steps, then falls linearly to zero
SNAPSHOT_EVERY = 60


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Initialize the model: every linear's dimensions are multiples of 256, embeddings are tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
        do_sample=False,
    )
    return model


def document_text(document: Document) -> str:
    """Frame a document with its special tokens; a chat already ends its last turn."""
    return BEGIN + document.text + ("" if document.kind == "chat" else END)


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Encode the documents into one stream and cut it into int64 sequences of LENGTH tokens, dropping the rest."""
    texts = [document_text(document) for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for tokens in encoded for token in tokens])
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def rate_at(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: warm-up, constant, linear decay."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * min(1.0, (steps - step) / (steps * (1 - DECAY_FROM)))


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Use Muon for the hidden matrices and AdamW for embeddings and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [
        Muon(hidden, lr=PEAK_RATE, weight_decay=0.05),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def perplexities(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> dict[str, float]:
    """Return the held-out perplexity per token of each kind of text."""
    model.eval()
    result = {}
    for kind in sorted({document.kind for document in corpus.held_out}):
        tokens = pack([document for document in corpus.held_out if document.kind == kind], tokenizer)
        losses = [model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch) for batch in tokens.split(8)]
        result[kind] = round(math.exp(float(torch.stack(losses).sum()) / len(tokens)), 2)
    model.train()
    return result


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 checkpoint and leave the model being trained untouched."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(out: Path, steps: int) -> None:
    """Train for a fixed number of steps, logging to standard output, with snapshots on the way."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    corpus = build_corpus(SEED)
    tokenizer = train_tokenizer([re.sub(r"<\|\w+\|>", "\n", document.text) for document in corpus.train])
    sequences = pack(corpus.train, tokenizer)
    model = build_model(tokenizer)
    optimizers = build_optimizers(model)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, {sequences.numel()} corpus tokens, {steps * SEQUENCES * LENGTH} to be seen", flush=True)
    began = time.perf_counter()
    for step in range(steps):
        rows = (torch.arange(SEQUENCES) + step * SEQUENCES) % len(sequences)
        batch_BT = sequences[rows]
        loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * rate_at(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} seconds {time.perf_counter() - began:.0f}", flush=True)
        if (step + 1) % SNAPSHOT_EVERY == 0:
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    print(json.dumps({"held_out_perplexity": perplexities(model, tokenizer, corpus)}), flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train builtin:mini from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
