# SPDX-License-Identifier: Apache-2.0
"""Many wordings of one scene: what a visitor may type about a speaking person, in plain English.

- every fact has synonyms and forms: before a noun, after "with", after "is", as a key with a value, as a sentence
- about a hundred ways to string the facts: sentences in any order, lists, keys, wishes, questions, capitals or none
- whole wordings are kept for evaluation: training forms neither their structures nor their pairs of synonyms
- the line is spelled natively or romanised; its language is named wherever two languages write it alike
- in one line of six there are words that nobody can say, and that a model learns to pass over
- "woman" says that there is no beard, so it stands only where the scene says so, too

    python examples/nano/prompts.py   # prints forty prompts
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any

import numpy as np
from people import Look, draw_look
from words import LANGUAGES, VOCABULARY, VOICE, Word, draw_words

from diffusers_magihuman import format_prompt

# In all tables, a string is a choice of phrases with | between them.
# Value: what follows "with" or "has", what follows "is" or a colon, and what precedes the person.
WORDINGS: dict[str, dict[Any, tuple[str, str, str]]] = {
    "skin": {
        "pale": ("pale skin|fair skin|light skin|a pale complexion", "pale|fair|light", "pale|fair-skinned"),
        "tan": ("tan skin|tanned skin|olive skin|a tan complexion", "tan|tanned|olive", "tanned|olive-skinned"),
        "brown": ("brown skin|a brown complexion", "brown", "brown-skinned"),
        "dark": ("dark skin|very dark skin|a deep complexion", "dark|very dark", "dark-skinned"),
    },
    "hair_style": {  # with the colour at the braces
        None: ("{} hair", "", ""),
        "short": ("short {} hair|{} hair cut short", "short|cut short", "short-haired"),
        "long": ("long {} hair|{} hair worn long", "long|very long", "long-haired"),
        "curly": ("curly {} hair|{} curls", "curly", "curly-haired"),
        "bun": ("{} hair in a bun|{} hair tied up|a {} bun", "in a bun|tied up", ""),
        "bob": ("a {} bob|{} hair in a bob|bobbed {} hair", "in a bob|bobbed", ""),
        "bald": ("no hair|a bald head|a shaved head", "none|shaved off", "bald"),
    },
    "hair_colour": {
        None: ("", "", ""),
        "black": ("", "black|jet-black", "black-haired"),
        "brown": ("", "brown|chestnut", "brown-haired|brunette"),
        "red": ("", "red|ginger|auburn", "red-haired|ginger"),
        "blond": ("", "blond|blonde|golden", "blond|blonde|fair-haired"),
        "white": ("", "white|silver|snow-white", "white-haired|silver-haired|grey-haired"),
    },
    "glasses": {
        True: ("glasses|round glasses|spectacles|eyeglasses", "yes", "bespectacled"),
        False: ("no glasses|no spectacles|no eyeglasses", "no|none", ""),
    },
    "beard": {
        True: ("a beard|a full beard", "yes|full", "bearded"),
        False: ("no beard", "no|none", "clean-shaven|beardless"),
    },
    "voice": {
        "deep": ("a deep voice|a low voice", "deep|low", "deep-voiced"),
        "medium": ("a medium voice|a normal voice", "medium|normal", ""),
        "high": ("a high voice|a high-pitched voice", "high|high-pitched", "high-voiced"),
    },
}
COLOUR = {
    "red": "red|red|red|scarlet|crimson",
    "yellow": "yellow|yellow|yellow|lemon yellow",
    "green": "green|green|green|emerald green",
    "blue": "blue|blue|blue|azure|bright blue",
    "purple": "purple|purple|purple|violet",
    "grey": "grey|gray",
    "pink": "pink|pink|pink|rose pink",
}
PLACE = {  # where the person is, and what is seen there
    "wall": ("in front of {}|before {}|against {}|with {} behind {them}", "the wall behind {them}|the wall"),
    "background": ("against {}|in front of {}", "the background"),
    "backdrop": ("in front of {}|before {}", "the backdrop"),
    "room": ("in {}|inside {}", "the room"),
}
GARMENT = ("shirt", "jumper", "top", "sweater", "T-shirt", "pullover", "blouse")
# Fact: its name before a colon, what the person does, and a sentence of its own.
FACTS = {
    "skin": ("skin|complexion", "has {noun}", "{their} skin is {plain}"),
    "hair": ("hair", "has {noun}", "{their} hair is {plain}"),
    "glasses": ("glasses|spectacles|eyeglasses", "wears {noun}|has {noun} on", ""),
    "beard": ("beard", "has {noun}", ""),
    "shirt": ("{shirt}", "wears {noun}|is in {noun}|is dressed in {plain}", "{their} {shirt} is {plain}"),
    "wall": ("{wall}", "stands {where}|sits {where}|is seen {where}", "{seen} is {plain}"),
    "voice": ("voice", "has {noun}", "{their} voice is {plain}"),
}
LOOKS = ("skin", "hair", "glasses", "beard", "shirt", "wall")
TRAITS = ("skin", "hair", "glasses", "beard")
PERSON = {  # pronoun: nouns that go with it alone, and its other cases
    "she": ("woman|lady", "her", "her"),
    "he": ("man|guy", "him", "his"),
    "they": ("person", "them", "their"),
}
ANYBODY = "person|speaker|presenter|teacher|host|singer"
SAYS = "says {line}{manner}|says{manner}: {line}|says{manner} {line}|says clearly{manner}: {line}"
SILENT = "is silent|listens|says nothing|"
QUOTED = '"{}"|"{}"|"{}"|“{}”|\'{}\'|{}'
SOMETHING = "something|a line|a few words|what follows"  # where the line is in a part of its own
LEAD = (
    "|||a video of|a close-up of|medium shot of|portrait of|cartoon of|we see|there is|show me|please make a clip of|"
    "I would like to see"
)
ASIDE = (
    "it rains outside|cinematic, 4k, static camera|the mood is warm|the camera does not move|high quality|"
    "it is late in the evening|shallow depth of field|medium close-up, static camera|birds sing far away"
)
QUIET = "Quiet room|No prominent background sound|Silence"

# Slots take a form of one fact, or are methods of `Writer`. Brackets fall away where their slots have nothing to say.
SLOTS = {
    "shirt": ("noun", "shirt"),
    "wall": ("noun", "wall"),
    "where": ("where", "wall"),
    "behind": ("statement", "wall"),
}
TRAINING = (
    "{lead} {who}[ with {traits}][, wearing {shirt}][, {where}]. {speech}",
    "{lead} {who}[ in {shirt}][ {where}][, with {traits}]. {speech}",
    "{lead} {who}. {sentences} {speech}",
    "{lead} {who}[ with {traits}]. {speech} {sentences}",
    "{lead} {who}[ in {shirt}][ {where}]. {sentences} {speech}",
    "{lead} {who}[ who {clauses}]. {speech}",
    "{lead} {who}[ with {traits}]. {wishes}",
    "{who}[ with {traits}][, dressed in {shirt},] {says}[ {where}]",
    "{who} {says}. {sentences}",
    "{who}[ with {traits}][, {wall}][, {shirt}][, {says}]",
    "[{where}, ]{who}[ with {traits}][ in {shirt}] {says}",
    "[wearing {shirt}, ]{who}[ with {traits}] {says}[ {where}]",
    "[{line}, says ]{who}[ with {traits}][ in {shirt}][ {where}]{manner}",
    "[{line}, says ]{who}{manner}. {sentences}",
    "[{behind}. ]{who}[ with {traits}][ in {shirt}] {says}",
    "[{behind}. ]{who}[ who {clauses}] {says}",
    "the {person} {clauses}. {speech}",
    "I want {who}[ with {traits}][ in {shirt}], please. {speech} [{behind}]",
    "can you make a video of {who}[ with {traits}][ in {shirt}]? {sentences} {speech}",
    "can I have {who}[ who {clauses}]? {speech}",
    *("{items}", "{items}", "{items}", "{who}: {items}", "{keys}", "{keys}", "{who}; {keys}"),
)
HELD_OUT = (
    "imagine {who}[ in {shirt}][ who {clauses}]. {speech}",
    "picture this: {items}",
    "let us film {who}. {sentences} {speech}",
    "what I need is {who}[ {where}][, in {shirt}][ and with {traits}]. {speech}",
    "[with {traits}, ]up comes {who}[ wearing {shirt}][; {behind}]. {speech}",
    "[so {behind}, and ]there we have {who}[ who {clauses}]. {speech}",
    "today we meet {who}[ in {shirt}]: {sentences} {speech}",
    "would it be possible to get {who}[ {where}][, with {traits}][ and in {shirt}]? {speech}",
    "my character is {who}. {wishes}",
    "[{shirt}, {traits}: ]that is how {who} looks[ {where}]. {speech}",
    "in this scene {who} {says}. {sentences}",
    "[{where}, ]now it is the turn of {who}. {sentences} {speech}",
    "my idea: {keys}",
    "[the words are {line}{manner}. ]{who} is on screen[, {where}][, in {shirt}][, with {traits}]",
    "director, bring on {who}! {sentences} {speech}",
    "hi! {who}[ wearing {shirt}], please[, and {wall}][, and {traits}]. {speech}",
    "is there a way to draw {who}[ who {clauses}]? {wishes}",
)
SEPARATORS = {False: (", ", ", ", "; ", " | ", "\n"), True: (" + ", " / ", " - ")}
MENDED = (
    (" +", " "),
    (r" ([.,;:?!\n]|$)", r"\1"),
    (r"[.,;: ]*([.?!])[. ]*\.", r"\1"),
    (r"\b([Aa]) (?=[aeiou])", r"\1n "),
    (r"(without|or) beard", r"\1 a beard"),
)
UNKNOWN = (  # frequent words that are not in the vocabulary
    "world|my|name|is|love|what|today|friend|je|suis|très|salut|monde|ich|bin|wie|heute|schön|世界|我|是|朋友|今天|我哋|今日|早晨|"
    "わたし|せかい|げんき|ともだち|日本|東京|電車|元気|세계|친구|오늘|사랑|저는|이름"
)
UNSPACED = {"Mandarin", "Cantonese", "Japanese"}
LINE = "@"  # stands for the line until letters have become capital or small
NUM_LANGUAGES = Counter(
    text for _, text in {(word.language, text) for word in VOCABULARY for text in (word.spelling, word.romanised)}
)


@dataclass(frozen=True)
class Scene:
    """What a prompt says: keys of the tables of `people` and `words`, `None` where it says nothing."""

    skin: str | None
    hair_colour: str | None
    hair_style: str | None
    glasses: bool | None
    beard: bool | None
    shirt: str | None
    wall: str | None
    voice: str | None
    words: tuple[Word, ...]

    @property
    def look(self) -> Look:
        return Look(*astuple(self)[:7])

    @property
    def is_held_out(self) -> bool:
        """Whether this combination of looks is kept for evaluation, whatever is heard."""
        return hashlib.sha256(repr(astuple(self.look)).encode()).digest()[0] % 5 == 0


def leave_out(rng: np.random.Generator, scene: Scene) -> Scene:
    """What a user may say of a scene: everything, or each of what is seen and heard but the words by chance."""
    chance = 0.5 * rng.integers(2)
    dropped = {field.name: None for field in fields(Scene)[:-1] if rng.random() < chance}
    return replace(without_needless(scene), **dropped)


def without_needless(scene: Scene) -> Scene:
    """Leaves out what nobody sees or hears: the colour of no hair, and the voice of who is silent."""
    colour = None if scene.hair_style == "bald" else scene.hair_colour
    return replace(scene, hair_colour=colour, voice=scene.voice if scene.words else None)


def make_prompt(rng: np.random.Generator, scene: Scene, held_out: bool = False, parts: int | None = None) -> str:
    """
    Describes a scene in one of many wordings.

    Args:
        rng (`np.random.Generator`): Draws the wording.
        scene (`Scene`): What to say; all of it is said, and nothing else of looks and voice.
        held_out (`bool`): Takes a wording that training never sees.
        parts (`int`, *optional*): 1 for the description, 3 for MagiHuman's three parts (two where nothing is said);
            drawn if `None`.

    Words that are not in the vocabulary are put into one line of six, and are all of the line where there are none.
    Half of the prompts of three parts are put together by [`format_prompt`], and of these half leave the line to it.
    """
    parts = parts or (1, 3)[rng.integers(2)]
    writer = Writer(rng, without_needless(scene), held_out, parts)
    is_formatted = parts == 3 and bool(writer.text) and rng.random() < 0.5
    instead = ""
    if is_formatted and rng.random() < 0.5:
        instead = writer.choose(SOMETHING)
        if scene.voice is None:  # else it is said with the line
            del writer.left["line"]
    templates = HELD_OUT if held_out else TRAINING
    description = writer.finish(writer.fill(templates[rng.integers(len(templates))]), instead)
    if parts == 1:
        return description
    speaker, sound = writer.named["person"].capitalize(), writer.choose(QUIET)
    if is_formatted:
        return format_prompt(description, [(speaker, writer.language, writer.text)], sound)
    dialogue = f'Dialogue:\n<{speaker}, {writer.language}>: "{writer.text}"\n\n' if writer.text else ""
    return f"{description}\n\n{dialogue}Background Sound:\n<{sound}>"


class Writer:
    """Words for one scene: each slot says some of what is `left` and takes it out, so that all is said once."""

    def __init__(self, rng: np.random.Generator, scene: Scene, held_out: bool, parts: int) -> None:
        self.rng, self.separators = rng, SEPARATORS[held_out]
        self.left = {name: value for name, value in asdict(scene).items() if name != "words" and value is not None}
        pronoun = self.choose("she|she|she|he|they" if scene.beard is False else "he|he|they")
        nouns, them, their = PERSON[pronoun]
        person = self.choose(nouns if rng.random() < 0.6 else ANYBODY)
        if person in PERSON["she"][0].split("|"):
            del self.left["beard"]
        garments = GARMENT if pronoun == "she" else GARMENT[:-1]
        # A pair of a garment and a place occurs in training or in evaluation, each of the two in both.
        pairs = [(a, b) for i, a in enumerate(garments) for j, b in enumerate(PLACE) if ((i + j) % 4 == 0) == held_out]
        shirt, wall = pairs[rng.integers(len(pairs))]
        self.named = {"person": person, "they": pronoun, "them": them, "their": their, "shirt": shirt, "wall": wall}
        self.named |= {"lead": self.choose(LEAD), "seen": self.choose(PLACE[wall][1]).format(**self.named)}
        self.left["person"] = person
        unknown = [self.unknown_word() for _ in range(rng.integers(1, 4))] if rng.random() < 1 / 6 else []
        self.language, self.text = self.spell(scene.words, unknown, parts) if scene.words or unknown else ("", "")

    def choose(self, phrases: str) -> str:
        options = phrases.split("|")
        return options[self.rng.integers(len(options))]

    def shuffled(self, pieces: Sequence[str]) -> list[str]:
        return [pieces[i] for i in self.rng.permutation(len(pieces))]

    def unknown_word(self) -> str:
        """A word that is not in the vocabulary: a frequent one, or made up."""
        letters = self.rng.choice([*"aaeeiioouubcdfghjklmnpqrstvwxyz"], self.rng.integers(4, 10))
        return self.choose(f"{self.choose(UNKNOWN)}|{''.join(letters)}")

    def spell(self, words: tuple[Word, ...], unknown: list[str], parts: int) -> tuple[str, str]:
        """The language of most words, and the line as it is written, with unknown words anywhere in it."""
        languages = Counter(word.language for word in words if word.language != "syllables")
        spoken = languages or Counter(word.language for word in words) or Counter([self.choose("|".join(LANGUAGES))])
        language = spoken.most_common(1)[0][0]
        is_native = self.rng.random() < 2 / 3
        written = [word.spelling if is_native else word.romanised for word in words]
        is_ambiguous = parts == 1 and any(NUM_LANGUAGES[each] > 1 for each in written)
        for word in unknown:
            written.insert(self.rng.integers(len(written) + 1), word)
        is_unspaced = spoken.keys() <= UNSPACED and not any(each.isascii() for each in written)
        text = self.choose(" |, |" if is_unspaced else " |, ").join(written)
        text = self.choose(f"{text}|{text}|{text[0].upper()}{text[1:]}") + self.choose("|||.|!")
        self.left["line"] = LINE
        if languages and (is_ambiguous or self.rng.random() < 0.25):
            self.left["language"] = language
        return language, text

    def fill(self, template: str) -> str:
        """Fills slots from left to right, and drops brackets whose slots are all empty."""

        def segment(match: re.Match) -> str:
            said = {name: self.slot(name) for name in re.findall(r"{(\w+)}", match[0])}
            return match[0].strip("[]").format(**said) if any(said.values()) else ""

        return re.sub(r"\[.*?\]|{\w+}", segment, template)

    def slot(self, name: str) -> str:
        if name in SLOTS:
            return "".join(self.take(*SLOTS[name]))
        return self.named[name] if name in self.named else vars(Writer)[name](self)

    def forms(self, name: str) -> dict[str, str]:
        """Takes a fact out of what is left, and gives its forms; colour and style of hair are one fact here."""
        if name == "hair":
            style, colour = self.left.pop("hair_style", None), self.left.pop("hair_colour", None)
            (noun, cut, adjective), (_, shade, other) = WORDINGS["hair_style"][style], WORDINGS["hair_colour"][colour]
            shade = self.choose(shade)
            noun = self.choose(noun).format(shade)
            plain = " and ".join(filter(None, self.shuffled([shade, self.choose(cut)])))
            adjective = "" if style and colour else adjective or other
        elif name in ("shirt", "wall"):
            plain, adjective = self.choose(COLOUR[self.left.pop(name)]), ""
            noun = f"a {plain} {self.named[name]}"
        else:
            noun, plain, adjective = WORDINGS[name][self.left.pop(name)]
            noun, plain = self.choose(noun), self.choose(plain)
        where = self.choose(PLACE[self.named["wall"]][0]).format(noun, **self.named)
        forms = self.named | {"noun": noun, "plain": plain, "where": where, "adjective": self.choose(adjective)}
        key, predicate, statement = FACTS[name]
        predicate = self.choose(predicate + "|is {adjective}" * bool(adjective))
        chosen = {"key": self.choose(key), "predicate": predicate, "statement": statement * (plain != "none")}
        return forms | {form: text.format(**forms) for form, text in chosen.items()}

    def take_all(self, *names: str) -> list[dict[str, str]]:
        """The forms of those facts that are left, in any order."""
        left = {"hair" if name.startswith("hair") else name for name in self.left}
        return [self.forms(name) for name in self.shuffled(names) if name in left]

    def take(self, form: str, *names: str) -> list[str]:
        return [forms[form] for forms in self.take_all(*names)]

    def sentence(self, predicates: list[str]) -> str:
        subject = self.choose("{they}|{they}|the {person}").format(**self.named)
        return f"{subject} {join(bare(text, 'are') if subject == 'they' else text for text in predicates)}."

    # Slots

    def who(self) -> str:
        """The person, with none to two adjectives."""
        self.left.pop("person", None)
        adjectives = []
        for name, wordings in WORDINGS.items():
            adjective = name in self.left and wordings[self.left[name]][2]
            if adjective and len(adjectives) < 2 and self.rng.random() < 0.3:
                del self.left[name]
                adjectives.append(self.choose(adjective))
        return " ".join(["a", *adjectives, self.named["person"]])

    def traits(self) -> str:
        nouns = self.take("noun", *TRAITS)
        has = [noun for noun in nouns if not noun.startswith("no ")]
        lacks = [noun for noun in nouns if noun.startswith("no ")]
        if has and lacks and self.rng.random() < 0.5:
            return f"{join(has)} but without {' or '.join(noun[3:] for noun in lacks)}"
        return join(has + lacks)

    def manner(self) -> str:
        """Voice and language, where they are not said yet."""
        phrases = [f"{self.choose('in|with')} {noun}" for noun in self.take("noun", "voice")]
        if "language" in self.left:
            phrases.append(f"in {self.left.pop('language')}")
        return "".join(f" {phrase}" for phrase in self.shuffled(phrases))

    def line(self) -> str:
        return self.left.pop("line", "")

    def says(self) -> str:
        if not self.text:
            return self.choose(SILENT)
        return self.fill(self.choose(SAYS)) if "line" in self.left else ""

    def speech(self) -> str:
        says = self.says()
        return says and self.sentence([says])

    def clauses(self) -> str:
        return join(self.take("predicate", *LOOKS))

    def wishes(self) -> str:
        predicates = [bare(text, "be") for text in [*self.take("predicate", *LOOKS), self.says()] if text]
        return f"{self.named['they']} should {join(predicates)}" if predicates else ""

    def sentences(self) -> str:
        """Sentences of one to three facts each."""
        facts, sentences = self.take_all(*LOOKS, *self.choose("||voice").split()), []
        while facts:
            size = self.rng.integers(1, 4)
            chunk, facts = facts[:size], facts[size:]
            is_short = len(chunk) == 1 and chunk[0]["statement"] and self.rng.random() < 0.6
            predicates = [forms["predicate"] for forms in chunk]
            sentences.append(f"{chunk[0]['statement']}." if is_short else self.sentence(predicates))
        return " ".join(sentences)

    def items(self) -> str:
        """A list of nouns, with their articles or without."""
        persons = [self.who()] if "person" in self.left else []
        items = [*persons, *self.take("noun", *LOOKS)]
        if self.rng.random() < 0.7:
            items = [re.sub("^a ", "", item) for item in items]
        items.append(self.fill(self.choose("{says}|{speech}")).rstrip("."))
        return self.joined(items if self.rng.random() < 0.7 else self.shuffled(items))

    def keys(self) -> str:
        """A list of keys with values."""
        pairs = [f"{forms['key']}: {forms['plain']}" for forms in self.take_all(*FACTS)]
        if pairs and self.named["person"] == "person":
            self.left.pop("person", None)
        pairs += [f"{name}: {self.left.pop(name)}" for name in ("person", "language", "line") if name in self.left]
        pairs = pairs if self.rng.random() < 0.7 else self.shuffled(pairs)
        return self.joined(pairs if self.rng.random() < 0.5 else [pair[0].upper() + pair[1:] for pair in pairs])

    def joined(self, pieces: list[str]) -> str:
        return self.separators[self.rng.integers(len(self.separators))].join(filter(None, pieces))

    def finish(self, text: str, instead: str) -> str:
        """Puts in an aside now and then, mends spaces and articles, chooses capitals, and puts in the line, or what
        is said instead of it."""
        text = text.strip(" ,;:")
        if self.rng.random() < 1 / 8:
            text = self.choose("{0}. {1}|{1}. {0}").format(text, self.choose(ASIDE))
        for pattern, replacement in MENDED:
            text = re.sub(pattern, replacement, text)
        text = re.sub(r"(^|[.?!] )[a-z]", lambda match: match[0].upper(), text)
        style = self.rng.random()
        if style < 0.2:
            text = text.lower().replace(". ", ", ").rstrip(".")
        elif style < 0.25:
            text = text.upper()
        elif style < 0.3:
            text = re.sub(r"(^|\s)[a-z]", lambda match: match[0].upper(), text)
        elif style < 0.8 and text[-1] not in ".?!":
            text += "."
        if instead:
            return text.replace(LINE, instead)
        quotes = self.choose(QUOTED)
        line = self.text.rstrip(".!") if quotes == "{}" else self.text
        return re.sub(r"([.!]\W)\.", r"\1", text.replace(LINE, quotes.format(line)))


def join(phrases: Iterable[str]) -> str:
    """a, b and c"""
    *others, last = [*phrases] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def bare(predicate: str, be: str) -> str:
    """Turns the verb of "wears glasses" into that of "they wear glasses", or with "be" into that of "should wear"."""
    verb = re.match(r"\w+", predicate)[0]
    return {"has": "have", "is": be}.get(verb, verb[:-1]) + predicate[len(verb) :]


def main() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = Scene(**vars(draw_look(rng)), voice=list(VOICE)[rng.integers(len(VOICE))], words=draw_words(rng, 3))
        print(make_prompt(rng, leave_out(rng, scene), held_out=seed % 4 == 3), end="\n\n---\n")


if __name__ == "__main__":
    main()
