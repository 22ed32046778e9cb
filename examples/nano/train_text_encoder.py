# SPDX-License-Identifier: Apache-2.0
"""Trains a tokenizer on prompts, and a `T5GemmaEncoderModel` of toy size to understand them.

    python examples/nano/train_text_encoder.py --output runs/text_encoder

A head that is thrown away afterwards reads off the encoder's states what a prompt says will be seen, and which word is
the first, the second and so on. The transformer's training then starts from a text that is understood, as that of the
full-size model does, and the encoder stays as it is.
"""

import copy
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from clips import make_scene
from prompts import Scene, leave_out, make_prompt
from recipe import Run, make_parser
from recognise import LOOKS
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import AutoTokenizer, GemmaTokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig
from words import MAX_WORDS, VOCABULARY, VOICE

from diffusers_magihuman.pipeline_base import DEFAULT_NEGATIVE_PROMPT

HIDDEN_SIZE = 128
TEXT_TOKENS = 128  # prompts are padded to multiples of it, most to itself
ATTRIBUTES = {**LOOKS, "voice": VOICE}


def make_tokenizer(prompts: list[str], vocab_size: int = 1100) -> GemmaTokenizer:
    """Learns byte pairs within words of prompts; characters are those of ASCII, of quotes and of the vocabulary."""
    alphabet = {"▁", "\n", "“", "”", *map(chr, range(33, 127))}.union(*(word.spelling for word in VOCABULARY)) - {" "}
    model = Tokenizer(BPE())
    model.pre_tokenizer = Split(Regex(r"▁?[A-Za-zÀ-ÿ]+|▁|\n+|."), "isolated")
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    model.train_from_iterator((prompt.replace(" ", "▁") for prompt in prompts), trainer)
    learned = json.loads(model.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return GemmaTokenizer(vocab=learned["vocab"], merges=merges, padding_side="right")


def make_text_encoder(vocab_size: int) -> T5GemmaEncoderModel:
    module = T5GemmaModuleConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=64,
        query_pre_attn_scalar=32,
        dropout_rate=0.0,
    )
    decoder = copy.deepcopy(module)  # some versions of Transformers mark it as causal
    config = T5GemmaConfig(encoder=module, decoder=decoder, is_encoder_decoder=False, vocab_size=vocab_size)
    return T5GemmaEncoderModel(config)


class Readings(NamedTuple):
    """Logits of attributes, each `(batch_size, num_values)`, and words, `(batch_size, MAX_WORDS, num_words + 1)`."""

    attributes: dict[str, torch.Tensor]
    words: torch.Tensor


class Reader(nn.Module):
    """Reads attributes and words off a text encoder's states, by one attention of learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(len(ATTRIBUTES) + MAX_WORDS, HIDDEN_SIZE))
        self.attention = nn.MultiheadAttention(HIDDEN_SIZE, 4, batch_first=True)
        heads = {name: nn.Linear(HIDDEN_SIZE, len(table)) for name, table in ATTRIBUTES.items()}
        self.attributes = nn.ModuleDict(heads)
        self.words = nn.Linear(HIDDEN_SIZE, len(VOCABULARY) + 1)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> Readings:
        queries = self.queries.expand(len(states), -1, -1)
        read, _ = self.attention(queries, states, states, key_padding_mask=~mask, need_weights=False)
        attributes = {name: head(read[:, i]) for i, (name, head) in enumerate(self.attributes.items())}
        return Readings(attributes, self.words(read[:, len(ATTRIBUTES) :]))


class TextModel(nn.Module):
    """The encoder and its reader, which are trained together."""

    def __init__(self, text_encoder: T5GemmaEncoderModel) -> None:
        super().__init__()
        self.text_encoder, self.reader = text_encoder, Reader()

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> Readings:
        return self.reader(self.text_encoder(input_ids, attention_mask=mask).last_hidden_state, mask.bool())


class Texts:
    """
    Embeds prompts as the pipelines do, but in batches.

    Args:
        folder (`Path`): Output of `train_text_encoder.py`.
        device (`torch.device`): Where to compute.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = T5GemmaEncoderModel.from_pretrained(folder / "text_encoder").to(device).eval()
        self.negative = self.embed([DEFAULT_NEGATIVE_PROMPT])

    def embed_negative(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative prompt so many times, as `embed` gives it."""
        return tuple(values.expand(count, *values.shape[1:]) for values in self.negative)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(batch, length, channels)` and their mask."""
        # Few lengths, so that a compiled transformer is compiled few times.
        tokens = self.tokenizer(prompts, padding=True, pad_to_multiple_of=TEXT_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.text_encoder.device)
        states = self.text_encoder(**tokens).last_hidden_state
        return states.half().float(), tokens.attention_mask.bool()


class Targets(NamedTuple):
    """What prompts say: numbers of values, -1 where nothing is said, and of words, the last where there is none."""

    attributes: dict[str, torch.Tensor]  # each (batch_size,)
    words: torch.Tensor  # (batch_size, MAX_WORDS)


def make_targets(scenes: list[Scene], device: torch.device) -> Targets:
    attributes = {
        name: torch.tensor([[*table, None].index(getattr(scene, name)) for scene in scenes], device=device)
        for name, table in ATTRIBUTES.items()
    }
    for name, numbers in attributes.items():
        numbers[numbers == len(ATTRIBUTES[name])] = -1
    words = torch.full((len(scenes), MAX_WORDS), len(VOCABULARY), device=device)
    for row, scene in zip(words, scenes, strict=True):
        row[: len(scene.words)] = torch.tensor([VOCABULARY.index(word) for word in scene.words])
    return Targets(attributes, words)


def draw_prompts(rng: np.random.Generator, count: int, held_out: bool = False) -> tuple[list[str], list[Scene]]:
    """Draws prompts of scenes of 1 to 6 seconds, and what each says."""
    scenes = [leave_out(rng, make_scene(rng, rng.integers(1, 7), held_out)) for _ in range(count)]
    return [make_prompt(rng, scene, held_out) for scene in scenes], scenes


def grade(readings: Readings, targets: Targets) -> dict[str, float]:
    """Parts of the prompts whose looks, or whose voice, are all read rightly where they are said, and whose words."""
    right = {
        name: (logits.argmax(dim=1) == targets.attributes[name]) | (targets.attributes[name] < 0)
        for name, logits in readings.attributes.items()
    }
    voice = right.pop("voice")
    looks = torch.stack([*right.values()]).all(dim=0)
    words = (readings.words.argmax(dim=2) == targets.words).all(dim=1)
    return {
        f"{name}_right": float(v.float().mean()) for name, v in (("looks", looks), ("voice", voice), ("words", words))
    }


def main() -> None:
    parser = make_parser(__doc__, steps=6000, batch_size=48, learning_rate=4e-3)
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    arguments = parser.parse_args()

    # 1. Tokenizer
    torch.manual_seed(arguments.seed)
    if arguments.start_from is None:
        prompts, _ = draw_prompts(np.random.default_rng(arguments.seed), 2000)
        tokenizer = make_tokenizer(prompts + [DEFAULT_NEGATIVE_PROMPT] * 30)
        text_encoder = make_text_encoder(len(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.start_from / "tokenizer")
        text_encoder = T5GemmaEncoderModel.from_pretrained(arguments.start_from / "text_encoder").float()
    tokenizer.save_pretrained(arguments.output / "tokenizer")

    # 2. Encoder, on prompts that never repeat
    run = Run(arguments, {"text": TextModel(text_encoder)})
    held_out_prompts, held_out_scenes = draw_prompts(np.random.default_rng(0), 256, held_out=True)

    def read(prompts: list[str]) -> Readings:
        texts = tokenizer(prompts, padding=True, return_tensors="pt").to(run.device)
        return run.models["text"](texts.input_ids, texts.attention_mask)

    def measure() -> dict[str, float]:
        grades = grade(read(held_out_prompts), make_targets(held_out_scenes, run.device))
        return {f"held_out_{name}": part for name, part in grades.items()}

    for rng in run.steps():
        prompts, scenes = draw_prompts(rng, arguments.batch_size)
        readings, targets = read(prompts), make_targets(scenes, run.device)
        losses = [4 * F.cross_entropy(readings.words.flatten(0, 1), targets.words.flatten())]
        for name, logits in readings.attributes.items():
            numbers = targets.attributes[name]
            total = F.cross_entropy(logits, numbers, ignore_index=-1, reduction="sum")
            losses.append(total / (numbers >= 0).sum().clamp(min=1))
        run.update("text", torch.stack(losses).sum(), **grade(readings, targets))
        run.measure(measure)

    # 3. Save
    run.unwrap("text").text_encoder.save_pretrained(arguments.output / "text_encoder")


if __name__ == "__main__":
    main()
