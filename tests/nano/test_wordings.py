# SPDX-License-Identifier: Apache-2.0
"""Prompts of the drawn world: a reader that knows synonyms finds each fact that a scene has, and no other."""

import re
from dataclasses import replace

import numpy as np
from people import draw_look
from prompts import UNKNOWN, Scene, leave_out, make_prompt
from words import LANGUAGES, VOCABULARY, VOICE, draw_words

from diffusers_magihuman.prompts import CJK

PLACE = "(wall|background|backdrop|room)( behind (her|him|them))?"
GARMENT = "(t-shirt|shirt|jumper|top|sweater|pullover|blouse)"
GLASSES = "(glasses|spectacles|eyeglasses)"
COLOUR = {"red": "red|scarlet|crimson", "purple": "purple|violet", "grey": "gr[ea]y", "pink": "(rose )?pink"}
COLOUR |= {"yellow": "(lemon )?yellow", "green": "(emerald )?green", "blue": "(bright )?blue|azure"}
SKIN = {"pale": "pale|fair|light", "tan": "tan|tanned|olive", "brown": "brown", "dark": "(very )?dark|deep"}
HAIR = {"black": "black|jet-black", "brown": "brown|chestnut", "red": "red|ginger|auburn"}
HAIR |= {"blond": "blonde?|golden|fair", "white": "white|silver|snow-white|grey"}
PITCH = {"deep": "deep|low", "medium": "medium|normal", "high": "high|high-pitched"}
READ = {
    "skin": {k: f"({s})(-skinned| skin| complexion)|(skin|complexion)( is|:) ({s})" for k, s in SKIN.items()},
    "hair_colour": {
        k: f"({s})(-haired| hair| curls| bun| bob)|hair( is|:)( [a-z ]+ and)? ({s})" for k, s in HAIR.items()
    },
    "hair_style": {"short": "short", "long": "long", "curly": "curly|curls", "bun": "bun|tied up", "bob": "bob|bobbed"}
    | {"bald": "bald|no hair|without hair|or hair|shaved|hair: none"},
    "glasses": {True: f"{GLASSES}|bespectacled", False: f"(no|without|or) {GLASSES}|{GLASSES}: no(ne)?"},
    "beard": {True: "beard(ed)?", False: "(no|without a|or a) beard|beard: no(ne)?|clean-shaven|beardless|woman|lady"},
    "shirt": {k: f"({s}) {GARMENT}|{GARMENT}( is|:) ({s})|dressed in ({s})" for k, s in COLOUR.items()},
    "wall": {k: f"({s}) {PLACE}|{PLACE}( is|:) ({s})" for k, s in COLOUR.items()},
    "voice": {k: f"({s})(-voiced| voice)|voice( is|:) ({s})" for k, s in PITCH.items()},
}
for fact, key, alone in (
    *(("skin", "pale", "pale"), ("skin", "tan", "tanned"), ("hair_colour", "brown", "brunette")),
    *(("hair_colour", "red", "ginger"), ("hair_colour", "blond", "blonde?")),
):
    READ[fact][key] += f"|{alone}"


def read(text, fact):
    said = {value for value, pattern in READ[fact].items() if re.search(rf"\b({pattern})\b", text, re.IGNORECASE)}
    return said - {True} if False in said else said


def draw(seed, held_out):
    rng = np.random.default_rng([seed, held_out])
    words = draw_words(rng, 3.0) if rng.random() < 0.8 else ()
    scene = Scene(**vars(draw_look(rng)), voice=[*VOICE][rng.integers(3)], words=words)
    return leave_out(rng, scene), rng


def spoken(scene):
    """What finds the line, in either spelling and with unknown words in it."""
    between = rf"[ ,]*(?:(?:{UNKNOWN}|[a-z]{{4,9}})[ ,]*){{0,3}}"
    lines = ([re.escape(word[column]).replace(" ", " ?") for word in scene.words] for column in (1, 2))
    either = "|".join(between.join(words) for words in lines)
    return re.compile(rf"(?<![a-z])({either})(?![a-z])" if scene.words else "", re.IGNORECASE)


def test_a_prompt_says_the_scene_and_nothing_else():
    for seed in range(500):
        held_out = seed % 2 == 1
        scene, rng = draw(seed, held_out)
        text = make_prompt(rng, scene, held_out, parts=1)
        assert spoken(scene).search(text), text
        for fact in READ:
            expected = set() if vars(scene)[fact] is None else {vars(scene)[fact]}
            assert read(text, fact) == expected, (fact, expected, text)
        assert not (scene.beard and re.search(r"\b(woman|lady|she|her)\b", text, re.IGNORECASE)), text


def unspaced(text):
    """Without the spaces that `format_prompt` puts between letters of Chinese, Japanese and Korean."""
    return re.sub(f"(?<={CJK}) (?={CJK})", "", text)


def test_half_of_the_lines_in_three_parts_are_as_the_command_writes_them():
    scene = Scene(*[None] * 8, tuple(word for word in VOCABULARY if word.spelling == "谢谢"))
    prompts = [make_prompt(np.random.default_rng(seed), scene, parts=3) for seed in range(200)]
    spaced = [prompt for prompt in prompts if "谢 谢" in prompt.split("Dialogue:")[1]]
    added = [prompt for prompt in spaced if re.search(r' \w+ says, "[^"]*"\n\nDialogue:', prompt)]
    assert 60 < sum("谢谢" in prompt.split("Dialogue:")[1] for prompt in prompts) < 140
    assert 0.3 < len(added) / len(spaced) < 0.9


def test_three_parts_hold_the_line_and_its_language():
    for seed in range(200):
        scene, rng = draw(seed, False)
        _, *dialogue, sound = make_prompt(rng, scene, parts=3).split("\n\n")
        assert re.fullmatch(r"Background Sound:\n<[\w ]+>", sound) and len(dialogue) >= bool(scene.words)
        for part in dialogue:
            speaker, language, line = re.fullmatch(r'Dialogue:\n<(\w+), (\w+)>: "(.*)"', part).groups()
            assert spoken(scene).search(unspaced(line))
            assert language in ({word.language for word in scene.words} or LANGUAGES)
            assert not scene.beard or speaker not in ("Woman", "Lady")


def test_one_line_in_six_has_words_that_nobody_says():
    known = {text.casefold() for word in VOCABULARY for text in (word.spelling, word.romanised)}
    ideographs = [text for text in known if not text.isascii()]
    assert not any(text in known or any(part in text for part in ideographs) for text in UNKNOWN.split("|"))
    for words in ((), VOCABULARY[3:5]):
        scene, counts = Scene(*[None] * 8, words), []
        for seed in range(600):
            prompt = unspaced(make_prompt(np.random.default_rng(seed), scene, parts=3))
            line = re.findall(r'>: "(.*)"', prompt.lower())[:1]
            counts.append(len(re.findall(r"[^ ,.!]+", line[0]) if line else ()) - len(words))
        assert {*counts} == {0, 1, 2, 3} and 0.12 < np.mean(np.array(counts) > 0) < 0.21


def test_wordings_and_looks_for_evaluation_are_not_those_of_training():
    scenes = [draw(seed, False)[0] for seed in range(1000)]
    first, again, held_out = (
        [make_prompt(np.random.default_rng(i), scene, part, 1).lower().rstrip(".") for i, scene in enumerate(scenes)]
        for part in (False, False, True)
    )
    assert first == again and not {*first} & {*held_out}
    assert 0.18 < np.mean([scene.is_held_out for scene in scenes]) < 0.22
    assert all(replace(scene, voice="deep", words=()).is_held_out == scene.is_held_out for scene in scenes)


def test_a_line_that_two_languages_write_alike_names_its_language():
    scene = Scene(*[None] * 8, tuple(word for word in VOCABULARY if word[:2] == ("Cantonese", "三")))
    texts = [make_prompt(np.random.default_rng(seed), scene, seed % 2, 1) for seed in range(100)]
    assert all("cantonese" in text.lower() for text in texts if "三" in text)
