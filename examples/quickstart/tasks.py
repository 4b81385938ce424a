"""The questions of the quickstart: memorised facts and small algorithms, all with one checkable answer.

Two kinds of task share one format (`Question`):

* Facts. `facts.json` freezes 4,000 or so facts in ten domains, most of them read from the Python standard library by
  `collect_facts` (which module defines a function, what a class derives from, code points of HTML entities, opcodes,
  MIME types, ...), some of them made up (address books, part numbers): they cannot be computed, only remembered. Every
  domain has four phrasings. For each fact one of the four is held out: it is never trained on *for this fact*. A
  held-out fact question therefore asks something the model has learned in a wording that it has not seen for it.
* Algorithms (addition, sorting, reversal, largest number). Held-out questions are new instances: the instance
  spaces are split by a hash of the question.

Everything is a pure function of the seed and `facts.json`, on every machine and every Python.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS_FILE = Path(__file__).with_name("facts.json")
NUM_PHRASINGS = 4

# Folders of the standard library that hold tests, generated tables or whole applications.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "encodings", "pydoc_data",
     "__pycache__", "config", "tix"}
)  # fmt: skip

PHRASINGS: dict[str, tuple[str, str, str, str]] = {
    "module_of_function": ("Which module defines {}?", "from ? import {}", "Module of {}?", "Where is {} defined?"),
    "base_of_class": ("Base class of {}?", "class {}(?)", "{} derives from?", "Parent of {}?"),
    "last_argument": ("Last argument of {}?", "def {}(..., ?)", "{} takes which argument last?", "Final parameter: {}"),
    "html_entity": ("Code point of &{};", "HTML entity {}?", "&{}; is U+?", "Which character is {}?"),
    "opcode": ("Number of opcode {}?", "opmap[{}]", "{} is encoded as?", "Opcode of {}?"),
    "mime_type": ("MIME type of {}?", "types_map[{}]", "Content-Type for {} files?", "Media type: {}"),
    "locale_alias": ("Which locale is {}?", "locale_alias[{}]", "Expand locale {}", "Full name of locale {}?"),
    "product": ("What is {}?", "{}=", "Multiply {}", "Product of {}?"),
    "phone": ("Phone number of {}?", "Call {}", "{} has which number?", "Dial {}:"),
    "part_price": ("Price of {}?", "What does {} cost?", "{} costs?", "Catalogue: {}"),
}

ALGORITHMS = ("add", "sort", "reverse", "largest")
FACT_TASKS = tuple(PHRASINGS)


@dataclass(frozen=True)
class Fact:
    """One thing to remember: `task` is the domain, `key` fills the phrasings, `answer` is the whole response."""

    task: str
    key: str
    answer: str


@dataclass(frozen=True)
class Question:
    """One prompt with its only right answer."""

    id: str
    task: str
    prompt: str
    answer: str

    def to_json(self) -> dict[str, Any]:
        """The line of a prompts file: chat-format prompt, id, answer, task."""
        return {
            "id": self.id,
            "task": self.task,
            "prompt": [{"role": "user", "content": self.prompt}],
            "answer": self.answer,
        }


# ------------------------------------------------------------------------------------------------ collecting facts
def stdlib_files() -> list[Path]:
    """Sources of the standard library of the running Python, in a fixed order, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]


def text_files(*, held_out: bool) -> list[Path]:
    """Files for language modelling; one in forty, chosen by its name, is held out from all training."""
    return [path for path in stdlib_files() if (_hash("text", path.name) % 40 == 0) == held_out]


# How many facts of each domain are kept: as much as a model of two million parameters just about remembers.
MOST_FACTS = {
    "module_of_function": 500,
    "base_of_class": 350,
    "last_argument": 250,
    "html_entity": 300,
    "opcode": 140,
    "mime_type": 140,
    "locale_alias": 150,
    "product": 200,
    "phone": 250,
    "part_price": 250,
}


def collect_facts(seed: int = 0) -> list[Fact]:
    """Facts of the running Python's standard library, and made-up tables; `facts.json` is its frozen result."""
    chooser = random.Random(f"{seed}-facts")
    domains: dict[str, list[Fact]] = {task: [] for task in FACT_TASKS}
    for fact in (*_source_facts(), *_library_table_facts(), *_made_up_facts(seed)):
        domains[fact.task].append(fact)
    kept: list[Fact] = []
    for task, found in domains.items():
        chosen = set(chooser.sample(range(len(found)), min(len(found), MOST_FACTS[task])))
        kept += [fact for i, fact in enumerate(found) if i in chosen]
    return kept


def _source_facts() -> Iterator[Fact]:
    """What public functions and classes of the standard library say about themselves, where the name is unique."""
    root = Path(sysconfig.get_path("stdlib"))
    functions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    bases: dict[str, list[str]] = defaultdict(list)
    for path in stdlib_files():
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args]
                functions[node.name].append((module, arguments[-1].arg if len(arguments) > 1 else ""))
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_") and len(node.bases) == 1:
                bases[node.name].append(ast.unparse(node.bases[0]))
    for name, found in sorted(functions.items()):
        module, last = found[0]
        if len(found) == 1 and module.count(".") <= 1 and "._" not in module and len(name) <= 14:
            yield Fact("module_of_function", name, module)
            if last:
                yield Fact("last_argument", name, last)
    for name, found_bases in sorted(bases.items()):
        if len(found_bases) == 1 and found_bases[0] not in ("object", "TokenList") and len(name) <= 16:
            yield Fact("base_of_class", name, found_bases[0])


def _library_table_facts() -> Iterator[Fact]:
    import html.entities
    import locale
    import mimetypes
    import opcode

    entities = {k[:-1]: v for k, v in html.entities.html5.items() if k.endswith(";") and len(v) == 1}
    for name in sorted(k for k in entities if len(k) <= 9):
        yield Fact("html_entity", name, f"{ord(entities[name]):04x}")
    for name, number in sorted(opcode.opmap.items()):
        yield Fact("opcode", name, str(number))
    for extension, media_type in sorted(mimetypes.types_map.items()):
        if len(media_type) <= 24:
            yield Fact("mime_type", extension, media_type)
    for name, full in sorted(locale.locale_alias.items()):
        if full.split(".")[0].lower() != name and len(full) <= 16:
            yield Fact("locale_alias", name, full)


_FIRST_NAMES = """Ada Alan Amir Anna Aino Berta Carl Chen Dora Edsger Elif Emil Emmy Felix Fumi Grace Hana Hugo Ida
Ines Ivan Jana Joan Jules Kaito Karen Lars Leo Lina Maya Milo Nadia Nils Noor Olga Omar Otto Paula Quinn Rania Rosa Ravi
Sara Sven Tara Theo Uma Vera Wim Yuki"""
_LAST_NAMES = """Abel Bell Curie Dirac Euler Frank Gauss Hopf Ito Jung Klein Lamb Mach Noll Ohm Pauli Riemann Stone
Turing Weyl"""


def _made_up_facts(seed: int) -> Iterator[Fact]:
    """Tables without any pattern: the answer can only be remembered."""
    chooser = random.Random(f"{seed}-made-up")
    people = [f"{first} {last}" for first in _FIRST_NAMES.split() for last in _LAST_NAMES.split()]
    for person in sorted(chooser.sample(people, 400)):
        yield Fact("phone", person, f"{chooser.randrange(100, 1000)}")
    for part in [f"{letter}{number}" for letter in "ABCDEFGHKLMNPRSTUVWXYZ" for number in range(10, 100)]:
        yield Fact("part_price", part, f"{chooser.randrange(100, 1000)}")
    for a in range(11, 35):
        for b in range(a, 35):
            yield Fact("product", f"{a}*{b}", str(a * b))


def write_facts(facts: list[Fact], path: Path = FACTS_FILE) -> None:
    """Freeze facts as `{domain: {key: answer}}`."""
    tables: dict[str, dict[str, str]] = {task: {} for task in FACT_TASKS}
    for fact in facts:
        tables[fact.task][fact.key] = fact.answer
    path.write_text(json.dumps(tables, indent=0, ensure_ascii=True) + "\n", encoding="ascii")


def load_facts(path: Path = FACTS_FILE) -> list[Fact]:
    """The frozen facts in file order."""
    tables: dict[str, dict[str, str]] = json.loads(path.read_text("ascii"))
    return [Fact(task, key, answer) for task, table in tables.items() for key, answer in table.items()]


# ------------------------------------------------------------------------------------------------------- questions
def _hash(*parts: str) -> int:
    """A hash that is the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def held_out_phrasing(fact: Fact) -> int:
    """Which of the four phrasings of its domain is never trained on for this fact."""
    return _hash(fact.task, fact.key) % NUM_PHRASINGS


def ask(fact: Fact, phrasing: int) -> Question:
    """The fact as a question in one of its domain's phrasings."""
    prompt = PHRASINGS[fact.task][phrasing].format(fact.key)
    return Question(f"{fact.task}/{fact.key}/{phrasing}", fact.task, prompt, fact.answer)


def trained_phrasings(fact: Fact) -> list[int]:
    """The three phrasings that training may use for this fact."""
    return [i for i in range(NUM_PHRASINGS) if i != held_out_phrasing(fact)]


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    return rng.choice(("{}+{}=", "Add {} and {}")).format(a, b), str(a + b)


def _digits(rng: random.Random) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(rng.randrange(3, 6)))


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng)
    return rng.choice(("Sort {}", "sorted({})")).format(digits), "".join(sorted(digits))


def _reverse(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng)
    return rng.choice(("Reverse {}", "reversed({})")).format(digits), digits[::-1]


def _largest(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), 3)
    return rng.choice(("Largest of {}, {}, {}", "max({}, {}, {})")).format(*numbers), str(max(numbers))


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add,
    "sort": _sort,
    "reverse": _reverse,
    "largest": _largest,
}


def algorithm_question(task: str, rng: random.Random, *, held_out: bool) -> Question:
    """A new instance of an algorithmic task, from the training or from the held-out tenth of all instances."""
    while True:
        prompt, answer = _MAKERS[task](rng)
        if (_hash(task, prompt) % 10 == 0) == held_out:
            return Question(f"{task}/{prompt}", task, prompt, answer)


def training_question(facts: list[Fact], rng: random.Random, *, fact_share: float) -> Question:
    """One random training question: a fact in a trained phrasing, or a training instance of an algorithm."""
    if rng.random() < fact_share:
        fact = rng.choice(facts)
        return ask(fact, rng.choice(trained_phrasings(fact)))
    return algorithm_question(rng.choice(ALGORITHMS), rng, held_out=False)


def question_set(
    facts: list[Fact], *, num_facts: int, num_algorithms: int, held_out: bool, seed: int
) -> list[Question]:
    """A fixed, duplicate-free set of questions: training ones or held-out ones, facts spread over all domains alike."""
    rng = random.Random(f"{seed}-{'heldout' if held_out else 'train'}")
    order = rng.sample(facts, len(facts))
    questions: dict[str, Question] = {}
    rounds = 0
    while len(questions) < num_facts:
        for fact in order:
            trained = trained_phrasings(fact)
            phrasing = held_out_phrasing(fact) if held_out else trained[(_hash(fact.key) + rounds) % len(trained)]
            if len(questions) < num_facts:
                question = ask(fact, phrasing)
                questions[question.id] = question
        rounds += 1
        if rounds > NUM_PHRASINGS and len(questions) < num_facts:
            raise ValueError(f"only {len(questions)} different fact questions exist, {num_facts} were asked for")
    while len(questions) < num_facts + num_algorithms:
        question = algorithm_question(ALGORITHMS[len(questions) % len(ALGORITHMS)], rng, held_out=held_out)
        questions[question.id] = question
    return rng.sample(list(questions.values()), len(questions))
