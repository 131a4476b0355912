"""Sentences as token ids: a text data set without download. The label says if the subject is plural."""

import random
from typing import Any

NOUNS = ["dog", "fox", "child", "teacher", "boat", "engine", "river", "letter"]
VERBS = [("runs", "run"), ("falls", "fall"), ("waits", "wait"), ("turns", "turn"), ("grows", "grow")]
WORDS = [
    "[pad]", "[cls]", "[sep]", "the", "near", "behind", "often", "never",
    *NOUNS, *(f"{noun}s" for noun in NOUNS), *(verb for pair in VERBS for verb in pair)]
IDS = {word: i for i, word in enumerate(WORDS)}
LENGTH = 16


def sentence(draw: random.Random) -> tuple[str, bool]:
    """Returns a sentence (subject, distracting nouns, a verb that agrees), and whether it is plural."""
    plural = draw.random() < 0.5
    words = ["the", draw.choice(NOUNS) + ("s" if plural else "")]
    for _ in range(draw.randrange(3)):
        words += [draw.choice(["near", "behind"]), "the", draw.choice(NOUNS) + draw.choice(["", "s"])]
    if draw.random() < 0.5:
        words.append(draw.choice(["often", "never"]))
    words.append(draw.choice(VERBS)[int(plural)])
    return " ".join(words), plural


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns tokenised sentences, padded to :data:`LENGTH`, together with the text."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text, plural = sentence(draw)
        ids = [IDS[word] for word in ("[cls]", *text.split(), "[sep]")]
        rest = LENGTH - len(ids)
        found.append({
            "input_ids": ids + [IDS["[pad]"]] * rest, "attention_mask": [1] * len(ids) + [0] * rest,
            "labels": int(plural), "sentence": text})
    return found
