# SPDX-License-Identifier: Apache-2.0
"""Trains a tokenizer on prompts, and a `T5GemmaEncoderModel` of toy size to understand them.

    python examples/nano/train_text_encoder.py --output runs/text_encoder

A head that is thrown away afterwards reads off the encoder's states what a prompt says will be seen, and which
syllable is heard in every twenty-fifth of a second. The transformer's training then starts from a text that is
understood, as that of the full-size model does, and the encoder stays as it is.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from recipe import Run, make_parser
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import AutoTokenizer, GemmaTokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from diffusers_magihuman.pipeline_base import DEFAULT_NEGATIVE_PROMPT

HIDDEN_SIZE = 128
ATTRIBUTES = {
    "skin": world.SKIN,
    "hair_colour": world.HAIR_COLOUR,
    "hair_length": world.HAIR_LENGTH,
    "glasses": world.GLASSES,
    "shirt": world.SHIRT,
    "background": world.BACKGROUND,
    "voice": world.VOICE,
}


def make_tokenizer(prompts: list[str], vocab_size: int = 640) -> GemmaTokenizer:
    """Learns byte pairs within the words of prompts; every printable ASCII character is a token, too."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = Split(Regex(r"▁?[A-Za-z]+|▁|\n+|."), "isolated")
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=["▁", "\n", *map(chr, range(33, 127))],
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


class Reader(nn.Module):
    """Reads attributes and syllables off a text encoder's states, by one attention of learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(len(ATTRIBUTES) + world.NUM_FRAMES, HIDDEN_SIZE))
        self.attention = nn.MultiheadAttention(HIDDEN_SIZE, 4, batch_first=True)
        sizes = [len(table) for table in ATTRIBUTES.values()]
        self.attributes = nn.ModuleList([nn.Linear(HIDDEN_SIZE, size) for size in sizes])
        self.syllables = nn.Linear(HIDDEN_SIZE, len(world.SYLLABLES) + 1)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        queries = self.queries.expand(len(states), -1, -1)
        read, _ = self.attention(queries, states, states, key_padding_mask=~mask, need_weights=False)
        attributes = [head(read[:, i]) for i, head in enumerate(self.attributes)]
        return attributes, self.syllables(read[:, len(ATTRIBUTES) :])


class TextModel(nn.Module):
    """The encoder and its reader, which are trained together."""

    def __init__(self, text_encoder: T5GemmaEncoderModel) -> None:
        super().__init__()
        self.text_encoder, self.reader = text_encoder, Reader()

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return self.reader(self.text_encoder(input_ids, attention_mask=mask).last_hidden_state, mask.bool())


class Texts:
    """
    Embeds prompts as the pipelines do, but in batches.

    Args:
        folder (`Path`): Output of `train_text_encoder.py`.
        device (`torch.device`): Where to compute.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="right")
        self.text_encoder = T5GemmaEncoderModel.from_pretrained(folder / "text_encoder").to(device).eval()
        negative, mask = self.embed([DEFAULT_NEGATIVE_PROMPT])
        self.negative = negative[:, mask[0]]

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(batch, length, channels)` and their mask."""
        # Few lengths, so that a compiled transformer is compiled few times.
        tokens = self.tokenizer(prompts, padding=True, pad_to_multiple_of=16, return_tensors="pt")
        tokens = tokens.to(self.text_encoder.device)
        states = self.text_encoder(**tokens).last_hidden_state
        return states.half().float(), tokens.attention_mask.bool()


def syllables_heard(scene: world.Scene) -> np.ndarray:
    """Number of the syllable in each frame, 0 for none."""
    times = (np.arange(world.NUM_FRAMES) + 0.5) / world.FRAME_RATE
    active = world.activations(scene, times, world.NUM_FRAMES / world.FRAME_RATE)
    numbers = np.array([list(world.SYLLABLES).index(name) + 1 for name in scene.syllables])
    return np.where(active.max(axis=0) > 0.5, numbers[active.argmax(axis=0)], 0)


def main() -> None:
    arguments = make_parser(__doc__, steps=1500, batch_size=48, learning_rate=1e-3).parse_args()

    # 1. Tokenizer
    rng = np.random.default_rng(arguments.seed)
    prompts = [world.make_prompt(world.make_scene(rng), rng) for _ in range(1000)]
    tokenizer = make_tokenizer(prompts + [DEFAULT_NEGATIVE_PROMPT] * 20)
    tokenizer.save_pretrained(arguments.output / "tokenizer")

    # 2. Encoder, on prompts that never repeat
    torch.manual_seed(arguments.seed)
    run = Run(arguments, {"text": TextModel(make_text_encoder(len(tokenizer)))})
    for rng in run.steps():
        scenes = [world.make_scene(rng) for _ in range(arguments.batch_size)]
        said = [world.leave_out(scene, rng) for scene in scenes]
        prompts = [world.make_prompt(scene, rng, parts=rng.random() < 0.5) for scene in said]
        texts = tokenizer(prompts, padding=True, return_tensors="pt").to(run.device)
        attributes, syllables = run.models["text"](texts.input_ids, texts.attention_mask)
        losses, hits = [], []
        for logits, (name, table) in zip(attributes, ATTRIBUTES.items(), strict=True):
            numbers = {None: -1, **{value: number for number, value in enumerate(table)}}
            target = torch.tensor([numbers[getattr(scene, name)] for scene in said], device=run.device)
            count = (target >= 0).sum().clamp(min=1)
            losses.append(F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / count)
            hits.append(((logits.argmax(dim=1) == target) | (target < 0)).float().mean())
        target = torch.from_numpy(np.stack([syllables_heard(scene) for scene in scenes])).to(run.device)
        losses.append(4 * F.cross_entropy(syllables.flatten(0, 1), target.flatten()))
        run.update(
            "text",
            torch.stack(losses).sum(),
            attributes_right=torch.stack(hits).mean(),
            syllables_right=(syllables.argmax(dim=2) == target).float().mean(),
        )

    # 3. Save
    run.unwrap("text").text_encoder.save_pretrained(arguments.output / "text_encoder")


if __name__ == "__main__":
    main()
