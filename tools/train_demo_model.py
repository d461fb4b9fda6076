"""Train a built-in model from scratch and write it as GGUF, with its model card.

    pip install torch gguf numpy tokenizers
    python tools/train_demo_model.py
    python tools/train_demo_model.py --draft     # the smaller one, which drafts for the other

The text comes from the story grammar in `stories.py`, new for every step; nothing is downloaded. `--steps 20` runs the
whole pipeline in about a minute. Progress goes to stderr, the held-out perplexity and samples to stdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import quants
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from stories import IM_END, IM_START, documents

FOLDER = Path(__file__).resolve().parents[1] / "src" / "minerva_native" / "demo"

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END)  # ids 0, 1, 2
BOS, CHAT = 0, 1  # the first token of every document, and the second one of every chat

PROMPT = "Once upon a time"
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 40, 0.95, 0.05

TOKENIZER_SEED, HELDOUT_SEED, TRAINING_SEED = 1_000_000, 2_000_000, 3_000_000
HELDOUT_DOCUMENTS = 64
OPENINGS_UNTIL = 0.2  # of the run: until then the rows are requests, each with the opening of its story
DOCUMENTS_A_CHUNK = 1000  # chunk i of the training text is documents(TRAINING_SEED + i, DOCUMENTS_A_CHUNK)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Hyperparameters of the llama architecture."""

    n_vocab: int = 1280
    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 4
    n_ff: int = 384
    n_ctx: int = 1024
    rms_eps: float = 1e-5
    rope_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Kind:
    """One of the built-in models.

    Attributes:
        limit_bytes: what the file must stay below.
        steps: of its training,
        batch_tokens: and tokens in each.
        purpose: what the description says it can do and is for.
        rest: how the description ends.
    """

    name: str
    file: str
    card: str
    limit_bytes: int
    steps: int
    batch_tokens: int
    shape: Shape
    purpose: str
    rest: str


DEMO = Kind(
    name="Minerva Demo",
    file="minerva-demo.gguf",
    card="MODEL_CARD.md",
    limit_bytes=2_000_000,
    steps=3480,
    batch_tokens=4096,
    shape=Shape(),
    purpose=(
        'It tells short English stories after an opening such as "Once upon a time", or in a chat when asked for a '
        "story about an animal or a child; a thing, a place or a theme in a request it often passes over. It exists so "
        "that a first command and the tests have something real to run."
    ),
    rest=(
        "It is not an assistant: it knows no facts, no other language and no other kind of text, and outside its small "
        "world it makes mistakes or nonsense."
    ),
)
DRAFT = Kind(
    name="Minerva Demo Draft",
    file="minerva-demo-draft.gguf",
    card="DRAFT_CARD.md",
    limit_bytes=300_000,
    steps=2665,
    batch_tokens=2048,
    shape=Shape(n_embd=64, n_layer=2, n_head=2, n_head_kv=2, n_ff=288),
    purpose=(
        "It has the vocabulary of Minerva Demo and guesses what that would write: a draft model for speculative "
        "decoding, so that the tests and the examples have a real pair."
    ),
    rest="Its own stories lose their thread; use Minerva Demo for text.",
)


@dataclass
class Run:
    """The facts of a training run.

    Attributes:
        duplicates: how many held-out documents were also among the training documents.
        perplexity: the perplexity on the held-out documents.
    """

    steps: int
    tokens: int
    seconds: float
    duplicates: int
    perplexity: float = math.nan


# --- model ---


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to `x` (batch, head, position, head_dim), pairing element i with i + head_dim/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """One layer: grouped-query attention, then a SwiGLU feed-forward, each on a normalised residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_dim = shape.n_head_kv * shape.head_dim
        self.attn_norm = nn.RMSNorm(shape.n_embd, shape.rms_eps)
        self.attn_qkv = nn.Linear(shape.n_embd, shape.n_embd + 2 * kv_dim, bias=False)
        self.attn_output = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.n_embd, shape.rms_eps)
        self.ffn_gate_up = nn.Linear(shape.n_embd, 2 * shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        batch, length, _ = x.shape
        qkv = self.attn_qkv(self.attn_norm(x)).view(batch, length, -1, shape.head_dim).transpose(1, 2)
        q, k, v = qkv.split((shape.n_head, shape.n_head_kv, shape.n_head_kv), dim=1)
        groups = shape.n_head // shape.n_head_kv
        k = rotate(k, cos, sin).repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        x = x + self.attn_output(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.ffn_gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn_down(F.silu(gate) * up)


class Llama(nn.Module):
    """The llama architecture with the output tied to the token embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, shape.rms_eps)
        frequency = shape.rope_base ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.n_ctx), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller, so that the variance does not grow with depth.
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.n_layer) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (batch, length, n_vocab) of token ids (batch, length)."""
        x = self.token_embd(ids)
        cos, sin = self.cos[: ids.shape[1]].to(x.dtype), self.sin[: ids.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)


def count_parameters(model: Llama) -> int:
    return sum(p.numel() for p in model.parameters())


# --- text ---


def train_tokenizer(n_vocab: int) -> Tokenizer:
    """Train byte-level BPE with the GPT-2 pre-tokenizer on text from a separate seed."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(TOKENIZER_SEED, 20_000), trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise RuntimeError(f"the text gave {tokenizer.get_vocab_size()} tokens, not {n_vocab}: lower n_vocab")
    return tokenizer


class Corpus:
    """An endless stream of packed rows; keeps a hash of each document, to find out whether held-out ones were used.

    Worker `rank` of `workers` takes every `workers`-th chunk of the text.
    """

    def __init__(self, tokenizer: Tokenizer, rank: int, workers: int) -> None:
        self.tokenizer = tokenizer
        self.chunks = itertools.count(rank, workers)
        self.seen: set[int] = set()  # hashes
        self._documents = self._encode()

    def _encode(self) -> Iterator[list[int]]:
        for chunk in self.chunks:
            texts = documents(TRAINING_SEED + chunk, DOCUMENTS_A_CHUNK)
            self.seen.update(map(hash, texts))
            yield from ([BOS, *encoding.ids] for encoding in self.tokenizer.encode_batch(texts))

    def __contains__(self, text: str) -> bool:
        return hash(text) in self.seen

    def batch(self, rows: int, length: int, chats_only: bool) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (rows, length). A row starts with a document, like every use of the model."""
        packed = []
        for _ in range(rows):
            ids: list[int] = []
            while len(ids) <= length:
                document = next(self._documents)
                if not chats_only or document[1] == CHAT:
                    ids += document
            packed.append(ids[: length + 1])
        tokens = torch.tensor(packed)
        return tokens[:, :-1], tokens[:, 1:]


# --- training ---


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(
            [{"params": [model.token_embd.weight], "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}],
            lr=0.003,
            betas=(0.9, 0.98),
        ),
    ]


def learning_rate_factor(progress: float) -> float:
    """Return a factor that rises over the first 2% of the run, stays level, and falls to about 0 in the second half."""
    return min((progress + 0.001) / 0.021, 1.0, max(2 * (1 - progress), 0.01))


def row_length(step: int, progress: float, n_ctx: int) -> int:
    """Return the number of tokens in a row: short rows first, and some with the full context throughout.

    Short rows consist mostly of the openings of stories. What takes longest to learn is to repeat something from the
    request in an opening (the animal, the name of the hero).
    """
    if progress < OPENINGS_UNTIL:
        return n_ctx // 16
    if step % 5 == 4:
        return n_ctx
    return n_ctx // 8 if progress < 0.4 else n_ctx // 4


def average_across_workers(model: Llama, *figures: float) -> list[float]:
    """Average the gradients in place, and return the averages of some figures."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(figures)])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([*(g.numel() for g in gradients), len(figures)]), strict=False):
        gradient.copy_(mean.view_as(gradient))
    averages: list[float] = flat[-len(figures) :].tolist()
    return averages


def train(model: Llama, corpus: Corpus, args: argparse.Namespace, report: bool) -> tuple[int, int, float]:
    """Train in place, as one of the workers; return the steps, the tokens that all workers saw, and the seconds."""
    forward = torch.compile(model, dynamic=False) if args.compile else model
    opts = optimizers(model)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    start = time.perf_counter()
    tokens, step, progress, smooth = 0, 0, 0.0, 0.0
    while progress < 1:
        length = row_length(step, progress, model.shape.n_ctx)
        inputs, targets = corpus.batch(args.batch_tokens // length // args.workers, length, progress < OPENINGS_UNTIL)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = forward(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        # The time is averaged too, because all workers must agree on the progress.
        seconds, mean_loss = average_across_workers(model, time.perf_counter() - start, loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(progress)
        for opt, opt_peaks in zip(opts, peaks, strict=True):
            for group, peak in zip(opt.param_groups, opt_peaks, strict=True):
                group["lr"] = peak * factor
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        tokens += inputs.numel() * args.workers
        progress = seconds / (60 * args.minutes) if args.minutes else step / args.steps
        smooth = mean_loss if step == 1 else 0.95 * smooth + 0.05 * mean_loss
        if report and (step % 10 == 0 or progress >= 1):
            rate, eta = tokens / seconds, max(seconds / progress - seconds, 0)
            line = f"step {step}  {min(progress, 1):4.0%}  loss {smooth:.4f}  {rate:,.0f} tokens/s  {eta:,.0f} s left"
            print(line, end="\r" if sys.stderr.isatty() and progress < 1 else "\n", file=sys.stderr, flush=True)
    return step, tokens, time.perf_counter() - start


# --- evaluation ---


def round_to_q8_0(model: Llama) -> None:
    """Round every matrix to Q8_0, so that all figures are those of the file."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                packed = quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType.Q8_0)
                parameter.copy_(torch.from_numpy(quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))


def perplexity(model: Llama, encoded: list[list[int]]) -> float:
    """Return exp of the mean negative log-probability of all tokens after BOS, each document in an empty context."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in encoded:
            row = torch.tensor([[BOS, *ids]])
            total += F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="sum").item()
            count += len(ids)
    return math.exp(total / count)


def sample(model: Llama, tokenizer: Tokenizer, prompt: str, generator: torch.Generator, max_tokens: int = 320) -> str:
    """Return text after `prompt`, with the recommended sampling, up to and including the end token."""
    ids = [BOS, *tokenizer.encode(prompt).ids]
    n_prompt = len(ids)
    with torch.no_grad():
        while len(ids) < n_prompt + max_tokens:
            p = F.softmax(model(torch.tensor([ids]))[0, -1] / TEMPERATURE, dim=-1)
            p, order = p.sort(descending=True)
            p[TOP_K:] = 0
            p[(p.cumsum(0) - p > TOP_P) | (p < MIN_P * p[0])] = 0
            ids.append(int(order[torch.multinomial(p, 1, generator=generator)]))
            if ids[-1] in (BOS, tokenizer.token_to_id(IM_END)):
                break
    text: str = tokenizer.decode(ids[n_prompt:], skip_special_tokens=False)
    return text


def chat_prompt(request: str) -> str:
    return f"{IM_START}user\n{request}{IM_END}\n{IM_START}assistant\n"


SAMPLE_PROMPTS = (
    PROMPT,
    PROMPT,
    "Once upon a time, there was a brave little mouse named Nora.",
    "One rainy day, Milo and his sister",
    chat_prompt("Tell me a story about a fox."),
    chat_prompt("Tell me a short story about a dragon and a red kite."),
    chat_prompt("Can you tell me a story about sharing?"),
    chat_prompt("Write a story about a girl named Zora."),
)


# --- file ---


def description(kind: Kind, model: Llama, run: Run) -> str:
    """Return the paragraph that is in the model card and in the file's metadata."""
    shape = model.shape
    which = "the small model" if kind == DEMO else "the smallest model"
    return (
        f"{kind.name} is {which} inside the minerva-native package: "
        f"{count_parameters(model) / 1e6:.1f} million parameters in the llama architecture ({shape.n_layer} layers, "
        f"width {shape.n_embd}, context {shape.n_ctx}, a byte-level BPE vocabulary of {shape.n_vocab} tokens), stored "
        f"as Q8_0. It was trained from nothing, on a CPU in {run.seconds / 60:.0f} minutes, on {run.tokens / 1e6:.1f} "
        "million tokens of children's stories and requests for stories that the project's own template grammar "
        f"(tools/stories.py) made from a seed; no other text was used. {kind.purpose} Its perplexity on "
        f"{HELDOUT_DOCUMENTS} held-out documents of the same grammar is {run.perplexity:.2f}. {kind.rest}"
    )


def card(text: str, kind: Kind, args: argparse.Namespace, run: Run) -> str:
    """Return the content of the model card."""
    how = "--draft " if kind == DRAFT else ""
    how += f"--minutes {args.minutes:g}" if args.minutes else f"--steps {args.steps}"
    rows = "\n".join(f"| {name} | {value:g} |" for name, value in asdict(kind.shape).items())
    return f"""# {kind.name}

{text}

| hyperparameter | value |
| --- | --- |
{rows}

- File: `{kind.file}`, matrices in Q8_0 and norms in F32; the output is tied to the token embedding.
- Licence: MIT.
- Recommended sampling: temperature {TEMPERATURE}, top-k {TOP_K}, top-p {TOP_P}, min-p {MIN_P}.
- Made by `python tools/train_demo_model.py {how} --seed {args.seed} --workers {args.workers}`, which took
  {run.steps:,} steps of {args.batch_tokens:,} tokens.
- Held-out perplexity {run.perplexity:.4f}, over all tokens of `stories.documents({HELDOUT_SEED}, {HELDOUT_DOCUMENTS})`,
  each document in an empty context after `{END_OF_TEXT}`, special tokens parsed, with the weights of the file.
  {run.duplicates} of these documents were also among the training documents.
- The corpus is not stored: `python tools/stories.py` prints some of it.
"""


def interleave(weight: NDArray[np.float32], n_head: int) -> NDArray[np.float32]:
    """Reorder rows of a query or key matrix: llama.cpp rotates neighbours, `rotate` elements half a head apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(n_head, 2, rows // n_head // 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def tensors(model: Llama) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the names and values of the file's tensors, with llama.cpp's names and layout."""
    shape = model.shape
    kv_dim = shape.n_head_kv * shape.head_dim
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    yield "token_embd.weight", state["token_embd.weight"]
    yield "output_norm.weight", state["output_norm.weight"]
    for i in range(shape.n_layer):
        q, k, v = np.split(state[f"blocks.{i}.attn_qkv.weight"], [shape.n_embd, shape.n_embd + kv_dim])
        gate, up = np.split(state[f"blocks.{i}.ffn_gate_up.weight"], 2)
        yield f"blk.{i}.attn_norm.weight", state[f"blocks.{i}.attn_norm.weight"]
        yield f"blk.{i}.attn_q.weight", interleave(q, shape.n_head)
        yield f"blk.{i}.attn_k.weight", interleave(k, shape.n_head_kv)
        yield f"blk.{i}.attn_v.weight", v
        yield f"blk.{i}.attn_output.weight", state[f"blocks.{i}.attn_output.weight"]
        yield f"blk.{i}.ffn_norm.weight", state[f"blocks.{i}.ffn_norm.weight"]
        yield f"blk.{i}.ffn_gate.weight", gate
        yield f"blk.{i}.ffn_up.weight", up
        yield f"blk.{i}.ffn_down.weight", state[f"blocks.{i}.ffn_down.weight"]


def write_gguf(path: Path, name: str, model: Llama, tokenizer: Tokenizer, text: str, heldout: float) -> None:
    """Write the file."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_author("The Minerva developers")
    writer.add_description(text)
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_size_label(f"{count_parameters(model) / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_float32("general.sampling.temp", TEMPERATURE)
    writer.add_int32("general.sampling.top_k", TOP_K)
    writer.add_float32("general.sampling.top_p", TOP_P)
    writer.add_float32("general.sampling.min_p", MIN_P)

    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)

    vocabulary = json.loads(tokenizer.to_str())["model"]
    words = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word in SPECIALS else gguf.TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(BOS)
    writer.add_eot_token_id(words.index(IM_END))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    writer.add_string("minerva.prompt", PROMPT)
    writer.add_float32("minerva.heldout_perplexity", heldout)
    writer.add_uint32("minerva.heldout_seed", HELDOUT_SEED)
    writer.add_uint32("minerva.heldout_documents", HELDOUT_DOCUMENTS)

    for tensor, value in tensors(model):
        if value.ndim == 2:
            q8_0 = quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor, q8_0, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a built-in model and write its GGUF and its card.")
    parser.add_argument("--draft", action="store_true", help="the smaller one, which drafts for the other")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"optimizer steps (default {DEMO.steps}, {DRAFT.steps} with --draft)")
    length.add_argument("--minutes", type=float, help="train for this long instead, which is not exactly reproducible")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and the samples (default %(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="tokens per step (default: 4096, 2048 with --draft)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per CPU)")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="compute in float32")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    parser.add_argument("--samples", type=int, default=1, help="rounds of samples to print (default %(default)s)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the GGUF and the card")
    args = parser.parse_args()
    args.kind = DRAFT if args.draft else DEMO
    args.steps = args.steps or args.kind.steps
    args.batch_tokens = args.batch_tokens or args.kind.batch_tokens
    return args


def work(rank: int, args: argparse.Namespace, tokenizer_json: str, folder: str) -> None:
    """Run a worker: a process with one thread, which waits for the others once per step, not in every operation."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    corpus = Corpus(tokenizer, rank, args.workers)
    model = Llama(args.kind.shape)
    steps, tokens, seconds = train(model, corpus, args, report=rank == 0)

    heldout = documents(HELDOUT_SEED, HELDOUT_DOCUMENTS)
    seen = torch.tensor([float(text in corpus) for text in heldout])
    distributed.all_reduce(seen)
    distributed.destroy_process_group()
    if rank == 0:
        torch.set_num_threads(args.workers)
        finish(model, tokenizer, args, Run(steps, tokens, seconds, int((seen > 0).sum())))


def finish(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace, run: Run) -> None:
    """Measure the model as it will be in the file, write the file and the card, and print samples."""
    round_to_q8_0(model)
    heldout = documents(HELDOUT_SEED, HELDOUT_DOCUMENTS)
    run.perplexity = perplexity(model, [encoding.ids for encoding in tokenizer.encode_batch(heldout)])
    print(run)

    kind = args.kind
    text = description(kind, model, run)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        path = Path(folder) / kind.file
        write_gguf(path, kind.name, model, tokenizer, text, run.perplexity)
        size_bytes = path.stat().st_size
        print(f"{size_bytes:,} bytes", flush=True)
        if size_bytes >= kind.limit_bytes:
            raise SystemExit(f"the file has {size_bytes:,} bytes, and the limit is {kind.limit_bytes:,}")
        path.replace(args.output / path.name)  # atomic, so that nobody sees half a file
    (args.output / kind.card).write_text(card(text, kind, args, run), encoding="utf-8")

    generator = torch.Generator().manual_seed(args.seed)
    for prompt in SAMPLE_PROMPTS * args.samples:
        print(f"\n---- {prompt!r}\n{sample(model, tokenizer, prompt, generator)}", flush=True)


def main() -> None:
    args = arguments()
    shape = args.kind.shape
    tokenizer = train_tokenizer(shape.n_vocab)
    print(f"{count_parameters(Llama(shape)):,} parameters, vocabulary {shape.n_vocab}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (args, tokenizer.to_str(), folder), nprocs=args.workers)


if __name__ == "__main__":
    main()
