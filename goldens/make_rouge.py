"""Makes the goldens of answers' scores in crates/retune-eval/tests/goldens from rouge_score, nltk and scikit-learn.

    python goldens/make_rouge.py            (rouge_score 0.1.2 with nltk 3.10.4, scikit-learn)

stems.tsv       a word and its stem a line: the vocabulary of the rules, and words of the bundled data
rouge.jsonl     pairs of texts, and rouge_score's four scores of them without and with the stemmer, [precision, recall, fmeasure]
squad.jsonl     pairs of answers, and SQuAD's exact match and F1 of them; the functions are those of evaluate-v2.0.py, in their own words
labels.json     pairs of labels, and scikit-learn's numbers
"""

import collections
import json
import random
import re
import string
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "crates" / "retune-eval" / "tests" / "goldens"
TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]

# Irregular words, every suffix of every step after short and long stems, and what the variants of the algorithm disagree on.
IRREGULAR = "sky skies dying lying tying news inning innings outing outings canning cannings howe proceed exceed succeed".split()
DISPUTED = """
days employ employed enjoy enjoys enjoyment says keep keeps toy toys dies died dried dries tied ties tries tried flies cried spied lies
archaeology geology theology biology logical apology possibly probably sensibly terribly generously general generate generically yearly
this herring using used uses user are eve ice ore use owing owed sing singed singing string stringed agreed feed freed need kneed plastered
bled motoring conflated troubled sized hopping tanned falling hissing fizzed failing filing happy sky syzygy yyyy yes yet youth
relational conditional rational valency hesitancy digitizer conformably radically differently vilely analogously vietnamization predication
operator feudalism decisiveness hopefulness callousness formality sensitivity sensibility hopefully rationally sensationally equally
triplicate formative formalize electricity electrical hopeful goodness revival allowance inference airliner gyroscopic adjustable defensible
irritant replacement adjustment dependent adoption homologous homologou communism activate angularity effective bowdlerize probate rate cease
controlling rolled controlled roll ponies caresses caress cats ass asses gas gases bus buses 2024s 1990s mp3 mp3s x86ing ing ed eed ied ies
""".split()
STEMS = ["", "b", "by", "r", "tr", "ab", "sens", "relat", "oper", "gener", "hop", "fall", "contr", "abyss", "x2", "yy", "fy", "play"]
SUFFIXES = """
sses ies ss s ied eed ed ing ated bled izing y ational tional enci anci izer bli abli alli entli eli ousli ization ation ator alism iveness
fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent ion sion
tion ou ism ate iti ous ive ize e ll lle
""".split()

# Empty, without words, repeated, long, in lines, and beyond ASCII.
TEXTS = [
    "", " ", "\n\n", "...", "日本語のテキスト", "½ ２０２４", "the cat\nsat on\nthe mat", "the mat\nthe cat sat", "the cat sat on the mat",
    "the the the the", "the", "cat", "don't snake_case 1,234.5", "don t snake case 1 234 5", "été-2024", "t 2024", "\u212aelvin", "kelvin",
    "İstanbul ΣΑΣ", "istanbul", "dying skies news generously", "die sky new generous", "a b a b a b", "b a b a", "a\n\nb\r\nc\ta", "A C. b!\nb",
    "one two three four five six seven", "seven six five four three two one", "one three two four\nsix five seven", "ab " * 200, "ab cd " * 150,
]


def rows(name, column):
    with open(ROOT / "examples" / "data" / name) as file:
        return [json.loads(line)[column] for line in file]


def stems():
    stemmer = PorterStemmer()
    words = {a + b for a in STEMS for b in SUFFIXES} | set(IRREGULAR) | set(DISPUTED)
    text = " ".join(rows("debian-synopsis.eval.jsonl", "input")).lower()
    words |= set(random.Random(0).sample(sorted(set(re.findall("[a-z0-9]+", text))), 600))
    lines = [f"{word}\t{stemmer.stem(word)}\n" for word in sorted(words) if word]
    (FOLDER / "stems.tsv").write_text("".join(lines))
    print(len(lines), "stems")


def pairs():
    """Every text beside some others, and real answers beside what they summarise and beside another's."""
    draw = random.Random(1)
    for reference in TEXTS:
        for prediction in draw.sample(TEXTS, 6) + [reference]:
            yield reference, prediction
    # Words beside others of their stems.
    for at in range(0, len(DISPUTED) - 8, 2):
        yield " ".join(DISPUTED[at : at + 8]), " ".join(re.sub("(s|ed|ing|ly|y)$", "", word) for word in DISPUTED[at + 2 : at + 9])
    answers, inputs = (rows("debian-synopsis.eval.jsonl", column) for column in ("output", "input"))
    for at, (answer, source) in enumerate(zip(answers, inputs)):
        if at % 4 == 0:
            yield answer, source[:240]
            yield source[:200], answers[at - 1]
    # Lines cut and shuffled, so that common subsequences of lines matter.
    for source in inputs[:40]:
        words = source.split()[:36]
        lines = [" ".join(words[i : i + 5]) for i in range(0, len(words), 5)]
        draw.shuffle(lines)
        yield "\n".join(" ".join(words[i : i + 7]) for i in range(0, len(words), 7)), "\n".join(lines)


def rouge():
    scorers = [RougeScorer(TYPES, use_stemmer=stem) for stem in (False, True)]
    lines = []
    for reference, prediction in pairs():
        line = {"reference": reference, "prediction": prediction}
        for name, scorer in zip(("plain", "stemmed"), scorers):
            scores = scorer.score(reference, prediction)
            line[name] = {t: [scores[t].precision, scores[t].recall, scores[t].fmeasure] for t in TYPES}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (FOLDER / "rouge.jsonl").write_text("".join(lines))
    print(len(lines), "pairs")


def squad_words(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad():
    answers = [
        "", "the", "a", ".", "The  Cat!", "cat", "a cat the", "an owl", "owl", "anowl", "the’ cat", "cat, cat", "cat cat dog", "dog cat", "U.S.A.", "usa",
        "été", "Été the", "thé", "a1", "1 a", "it's", "its", "the_cat", "thecat", "日本 a", "日本",
    ]
    lines = []
    for reference in answers:
        for prediction in answers:
            a, b = squad_words(reference), squad_words(prediction)
            same = sum((collections.Counter(a) & collections.Counter(b)).values())
            if not a or not b:
                f1 = float(a == b)
            else:
                f1 = 2 * (same / len(a)) * (same / len(b)) / (same / len(a) + same / len(b)) if same else 0.0
            lines.append([reference, prediction, a == b, f1])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (FOLDER / "squad.jsonl").write_text(text)
    print(len(lines), "answers")


def labels():
    draw, cases = random.Random(2), []
    names = ["negative", "neutral", "positive"]
    # Labels that are predicted and never right, that are never predicted, and that are neither.
    for said, told in ((names, names), (names, names + ["perhaps"]), (names, names[:2]), (names[1:], names), (names[1:], names[1:])):
        true = draw.choices(said, weights=[1, 5, 2][-len(said):], k=60)
        predicted = [t if draw.random() < 0.6 and t in told else draw.choice(told) for t in true]
        kind = dict(zero_division=0)
        precision, recall, f1, support = precision_recall_fscore_support(true, predicted, average=None, **kind)
        cases.append({
            "labels": sorted(set(true) | set(predicted)), "reference": true, "prediction": predicted,
            "accuracy": accuracy_score(true, predicted), "macro_f1": f1_score(true, predicted, average="macro", **kind),
            "of_labels": [list(map(float, row)) for row in zip(precision, recall, f1, support)],
        })
    (FOLDER / "labels.json").write_text(json.dumps(cases) + "\n")
    print(len(cases), "cases of labels")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    stems()
    rouge()
    squad()
    labels()
