"""What things are called, how numbers are written, and the sentences at the head of a page."""

from __future__ import annotations

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
METRIC_NAMES = {
    "auroc": "AUROC",
    "aupr": "AUPR",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "ECE",
}
LOWER_IS_BETTER = ("brier", "ece")
PROTOCOL_NAMES = {"knn": "k nearest neighbours", "linear": "linear probe", "finetune": "fine-tuning"}


def number(value: float) -> str:
    """A metric as it is read.

    >>> number(0.98765), number(0.0)
    ('0.988', '0.000')
    """
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A difference, with a minus and not a hyphen.

    >>> signed(0.0123), signed(-0.2) == f"{MINUS}0.200"
    ('+0.012', True)
    """
    return f"{value:+.3f}".replace("-", MINUS)


def p_value(p: float) -> str:
    """A p-value as it is read.

    >>> p_value(0.0312), p_value(0.00001), p_value(0.5)
    ('0.031', '< 0.001', '0.50')
    """
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def listed(names: list[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def count(n: int, what: str, plural: str = "") -> str:
    """How many of what.

    >>> count(1, "image"), count(1200, "image"), count(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{n:,} {what if n == 1 else plural or what + 's'}"
