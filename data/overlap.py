"""Word overlap: how many of a query's words a document has, the rare ones weighing more.

The baseline that a trained model should beat (`baselines`), and the reader from whom a model that
starts from nothing learns the form of an answer (from_csv.py, chorus.py).
"""

import math
import re
from collections import Counter, defaultdict

import numpy as np


def words(text):
    """The set of lower-case words of a text."""
    return set(re.findall(r"\w+", text.lower()))


def compare(record):
    """The query's words that the document has and those that it lacks, in the query's order."""
    query = list(dict.fromkeys(re.findall(r"\w+", record["query"].lower())))
    there = words(record["document"])
    has = [word for word in query if word in there]
    lacks = [word for word in query if word not in there]
    return has, lacks


def word_weights(documents):
    """{word: its idf in the documents}; one that none of them has weighs most."""
    counts = Counter(word for text in documents for word in words(text))
    most = math.log(len(documents) + 1)
    weights = {word: most - math.log(count + 1) for word, count in counts.items()}
    return defaultdict(lambda: most, weights)


def overlap_scores(records, weights):
    """Each record's share of its query's words, by weight, that its document holds, 0 to 1."""
    scores = []
    for record in records:
        query = words(record["query"])
        held = query & words(record["document"])
        total = sum(weights[word] for word in sorted(query))
        scores.append(sum(weights[word] for word in sorted(held)) / (total or 1.0))
    return scores


def fit_thresholds(scores, gold, classes):
    """classes - 1 ascending thresholds that turn scores into class indices with the highest
    accuracy: the exact optimum.

    Moving threshold g up to cut c turns what lies below it from class g + 1 into class g;
    `gains[c, g]` is what that wins.
    """
    values, places = np.unique(scores, return_inverse=True)
    counts = np.zeros((len(values) + 1, classes), dtype=int)
    np.add.at(counts, (places + 1, gold), 1)
    below = counts.cumsum(0)
    gains = below[:, :-1] - below[:, 1:]
    best = gains[:, 0]
    paths = [(c,) for c in range(len(gains))]
    for g in range(1, classes - 1):
        # Where threshold g - 1 lies best, at or below c.
        firsts = [int(best[: c + 1].argmax()) for c in range(len(gains))]
        paths = [(*paths[first], c) for c, first in enumerate(firsts)]
        best = best[firsts] + gains[:, g]
    edges = np.append(values, np.inf)  # cut c: the c lowest values lie below
    return edges[list(paths[int(best.argmax())])]


def by_thresholds(labels, train_scores, train, test_scores):
    """Predictions of scores alone: they order the documents, and thresholds make them labels.

    The thresholds are those with the highest accuracy on the training pairs.
    """
    gold = [labels.index(record["label"]) for record in train]
    thresholds = fit_thresholds(train_scores, gold, len(labels))
    places = np.searchsorted(thresholds, test_scores, side="right")
    pairs = zip(places, test_scores, strict=True)
    return [{"label": labels[place], "grade": score} for place, score in pairs]


def label_by_words(labels, train, records):
    """Predictions for records by idf overlap, learned from the training pairs."""
    weights = word_weights({record["document"] for record in train})
    of_train = overlap_scores(train, weights)
    return by_thresholds(labels, of_train, train, overlap_scores(records, weights))


def baselines(labels, train, test):
    """Predictions for test pairs of what trains no model, as grm.metrics takes them.

    majority: the most frequent label of the training pairs for every pair; overlap: see above.
    """
    gold = [labels.index(record["label"]) for record in train]
    common = labels[int(np.bincount(gold).argmax())]
    return {
        "majority": [{"label": common, "grade": 0.0}] * len(test),
        "overlap": label_by_words(labels, train, test),
    }
