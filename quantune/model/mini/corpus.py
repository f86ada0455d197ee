"""The corpus of `builtin:mini`: standard-library and generated text, split into training and held-out documents."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from quantune.model.mini.skills import draw_pair
from quantune.model.mini.stdlib_text import stdlib_documents
from quantune.model.mini.stories import data_document, story

# Characters of each kind: this, and a shuffle of the documents, is the training mixture.
CHARACTERS = {"prose": 700_000, "code": 700_000, "story": 800_000, "data": 600_000, "chat": 4_000_000}
HELD_OUT_SHARE = 0.02
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "Reply with the answer only.")


class Document(NamedTuple):
    """One text of the corpus, without the special tokens that begin and end it (a chat carries its inner ones)."""

    kind: str
    text: str


class Corpus(NamedTuple):
    """Training and held-out documents; no text is in both."""

    train: list[Document]
    held_out: list[Document]


def render_chat(messages: list[tuple[str, str]]) -> str:
    """Render (role, content) messages as the chat template does, without the leading `<|begin|>`."""
    return "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in messages)


def chat(rng: Random) -> str:
    """Draw a conversation of one to six questions about small skills."""
    messages = [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.1 else []
    for _ in range(rng.choice((1, 2, 3, 4, 6))):
        question, answer = draw_pair(rng)
        messages += [("user", question), ("assistant", answer)]
    return render_chat(messages)


def generate(draw: Callable[[Random], str], characters: int, seed: str) -> list[str]:
    """Draw distinct texts until they hold the wanted number of characters."""
    rng = Random(seed)
    texts: dict[str, None] = {}
    total = 0
    while total < characters:
        text = draw(rng)
        if text not in texts:
            texts[text] = None
            total += len(text)
    return list(texts)


def cap(texts: list[str], characters: int) -> list[str]:
    """Keep the leading texts up to the wanted number of characters."""
    kept, total = [], 0
    for text in texts:
        if total >= characters:
            break
        kept.append(text)
        total += len(text)
    return kept


def build_corpus(seed: int = 0) -> Corpus:
    """Build every document; the same seed and Python version give the same corpus."""
    kinds = {kind: cap(texts, CHARACTERS[kind]) for kind, texts in stdlib_documents().items()}
    for kind, draw in (("story", story), ("data", data_document), ("chat", chat)):
        kinds[kind] = generate(draw, CHARACTERS[kind], f"{kind}-{seed}")
    train, held_out = [], []
    for kind, texts in kinds.items():
        documents = [Document(kind, text) for text in texts]
        cut = max(1, int(len(documents) * HELD_OUT_SHARE))
        held_out += documents[:cut]
        train += documents[cut:]
    Random(seed).shuffle(train)
    return Corpus(train, held_out)
